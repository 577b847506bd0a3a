// Half-precision numbers by their bits, as the hardware converts them: to nearest even, NaN to the hardware's NaN.
#pragma once

#include <cstdint>

namespace simt {

inline uint32_t float_of_fp16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  uint32_t exponent = half >> 10 & 0x1f, fraction = half & 0x3ff;
  if (exponent == 31) return sign | 0x7f800000 | fraction << 13;
  if (exponent == 0) {
    if (fraction == 0) return sign;
    exponent = 1;
    for (; !(fraction & 0x400); fraction <<= 1) --exponent;
    fraction &= 0x3ff;
  }
  return sign | (exponent + 112) << 23 | fraction << 13;
}

// value / 2^shift to nearest, ties to even.
inline uint32_t shift_to_even(uint32_t value, int shift) {
  const uint32_t half = 1u << (shift - 1), rest = value & (2 * half - 1), kept = value >> shift;
  return kept + (rest > half || (rest == half && (kept & 1)));
}

inline uint16_t fp16_of_float(uint32_t bits) {
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x47800000) return sign | 0x7c00;  // 65536 and above
  const int exponent = static_cast<int>(magnitude >> 23);
  if (exponent < 113) {  // below 2^-14: units of 2^-24
    const int shift = 126 - exponent;
    return static_cast<uint16_t>(shift > 25 ? sign : sign | shift_to_even((magnitude & 0x7fffff) | 0x800000, shift));
  }
  return static_cast<uint16_t>(sign | shift_to_even(magnitude - (112u << 23), 13));
}

inline uint16_t bf16_of_float(uint32_t bits) {
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<uint16_t>(shift_to_even(bits, 16));
}

}  // namespace simt
