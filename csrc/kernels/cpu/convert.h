// Blocks of logits between memory (fp32, bf16, fp16) and fp32 lanes. Blocks are padded to whole lane groups: masked
// (-inf) columns after the end when loaded, exactly the asked-for columns when stored.
#pragma once

#include "../../core/softcap.h"
#include "../params.h"
#include "simd.h"

namespace fastkd {
namespace {

typedef uint16_t HalfLanes __attribute__((vector_size(2 * kLanes)));
typedef uint32_t WordLanes __attribute__((vector_size(4 * kLanes)));

constexpr int padded(int n) { return (n + kLanes - 1) / kLanes * kLanes; }

// fp16 as an fp32 bit pattern and back, for instruction sets without the conversion.
FASTKD_FN Vec float_of_half_bits(WordLanes h) {
  const WordLanes sign = (h & 0x8000u) << 16, magnitude = (h & 0x7fffu) << 13;
  const FloatLanes scaled = (FloatLanes)magnitude * 0x1p112f;  // rebias; also right for subnormals
  const WordLanes special = magnitude | 0x7f800000u;           // inf and NaN
  return (FloatLanes)(((WordLanes)(magnitude >= 0x0f800000u ? special : (WordLanes)scaled)) | sign);
}

FASTKD_FN WordLanes half_bits_of_float(Vec x) {
  const WordLanes bits = (WordLanes)x.v, sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // normal: round to nearest even at bit 13; subnormal: let an fp32 addition do the rounding
  const WordLanes normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  const WordLanes subnormal = (WordLanes)((FloatLanes)magnitude + 0.5f) - 0x3f000000u;
  WordLanes h = magnitude < 0x38800000u ? subnormal : normal;
  h = magnitude >= 0x477ff000u ? WordLanes{} + 0x7c00u : h;  // rounds to infinity
  h = magnitude > 0x7f800000u ? WordLanes{} + 0x7e00u : h;   // NaN
  return h | sign;
}

FASTKD_FN WordLanes bfloat_bits_of_float(Vec x) {
  const WordLanes bits = (WordLanes)x.v;
  const WordLanes rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded;
}

FASTKD_FN Vec lanes_of_bfloat(HalfLanes h) {
#if defined(__AVX512BW__)
  // one instruction, where widening and shifting take two of the few that the exponentials leave room for
  const __m512i words = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0,  //
                                         7, 0, 6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
  return (FloatLanes)_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, words, _mm512_castsi256_si512((__m256i)h));
#else
  return (FloatLanes)(__builtin_convertvector(h, WordLanes) << 16);
#endif
}

template <DType dtype>
FASTKD_FN Vec load_lanes(const char* p) {
  if constexpr (dtype == DType::float32) {
    return Vec::load(reinterpret_cast<const float*>(p));
  } else {
    HalfLanes h;
    std::memcpy(&h, p, sizeof(h));
    if constexpr (dtype == DType::bfloat16) return lanes_of_bfloat(h);
#if defined(__AVX512F__)
    return (FloatLanes)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
    return (FloatLanes)_mm256_cvtph_ps((__m128i)h);
#else
    return float_of_half_bits(__builtin_convertvector(h, WordLanes));
#endif
  }
}

template <DType dtype>
FASTKD_FN void store_lanes(char* p, Vec x) {
  if constexpr (dtype == DType::float32) {
    x.store(reinterpret_cast<float*>(p));
  } else {
    HalfLanes h;
    if constexpr (dtype == DType::bfloat16) {
      h = __builtin_convertvector(bfloat_bits_of_float(x), HalfLanes);
    } else {
#if defined(__AVX512F__)
      h = (HalfLanes)_mm512_cvtps_ph((__m512)x.v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
      h = (HalfLanes)_mm256_cvtps_ph((__m256)x.v, _MM_FROUND_TO_NEAREST_INT);
#else
      h = __builtin_convertvector(half_bits_of_float(x), HalfLanes);
#endif
    }
    std::memcpy(p, &h, sizeof(h));
  }
}

// bf16 by the processor's own instruction, two lane groups at a time. Returns how many columns it stored.
#if defined(__AVX512F__)
__attribute__((target("avx512bf16"))) int store_bfloat16_native(const float* x, int n, char* out) {
  int i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const __m512bh h = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + i + kLanes), _mm512_loadu_ps(x + i));
    std::memcpy(out + 2 * i, &h, sizeof(h));
  }
  return i;
}
bool has_native_bfloat16() {
  static const bool yes = __builtin_cpu_supports("avx512bf16");
  return yes;
}
#endif

// n columns of src as fp32 at dst (padded); returns their maximum, NaN left aside.
template <DType dtype>
float load_block_as(const char* src, int n, float softcap, float* dst) {
  constexpr int size = static_cast<int>(size_of(dtype));
  Vec largest(minus_infinity());
  const Vec cap(softcap), inverse_cap(softcap == 0 ? 0.0f : 1.0f / softcap);
  const auto take = [&](int i, Vec x) {
    if (softcap != 0) x = softcapped(x, cap, inverse_cap);
    largest = max(x, largest);
    x.store(dst + i);
  };
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) take(i, load_lanes<dtype>(src + i * size));
  if (i < n) {
    char tail[kLanes * size];
    const float minus_inf = minus_infinity();
    Vec(minus_inf).store(dst + i);  // the padding
    store_lanes<dtype>(tail, Vec(minus_inf));
    std::memcpy(tail, src + i * size, static_cast<size_t>(n - i) * size);
    take(i, load_lanes<dtype>(tail));
  }
  return max_lanes(largest);
}

float load_block(const char* src, DType dtype, int n, float softcap, float* dst) {
  if (dtype == DType::bfloat16) return load_block_as<DType::bfloat16>(src, n, softcap, dst);
  if (dtype == DType::float16) return load_block_as<DType::float16>(src, n, softcap, dst);
  return load_block_as<DType::float32>(src, n, softcap, dst);
}

// A block as fp32 with its maximum: in place where it is that already, else converted into `buffer`.
struct Block {
  const float* logits;
  float largest;
};

FASTKD_FN Block read_block(const char* src, DType dtype, int n, float softcap, float* buffer) {
  if (dtype != DType::float32 || softcap != 0 || n % kLanes != 0) {
    return {buffer, load_block(src, dtype, n, softcap, buffer)};
  }
  const float* logits = reinterpret_cast<const float*>(src);
  Vec a(minus_infinity()), b = a;
  int i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    a = max(Vec::load(logits + i), a);
    b = max(Vec::load(logits + i + kLanes), b);
  }
  for (; i < n; i += kLanes) a = max(Vec::load(logits + i), a);
  return {logits, max_lanes(max(a, b))};
}

// The logit of one column, softcapped.
FASTKD_FN float read_column(const char* row, DType dtype, int64_t column, float softcap) {
  float block[kLanes];
  return load_block(row + column * size_of(dtype), dtype, 1, softcap, block);
}

template <DType dtype>
void store_block_as(const float* x, int n, char* dst) {
  constexpr int size = static_cast<int>(size_of(dtype));
  int i = 0;
#if defined(__AVX512F__)
  if constexpr (dtype == DType::bfloat16) {
    if (has_native_bfloat16()) i = store_bfloat16_native(x, n, dst);
  }
#endif
  for (; i + kLanes <= n; i += kLanes) store_lanes<dtype>(dst + i * size, Vec::load(x + i));
  if (i < n) {
    char tail[kLanes * size];
    store_lanes<dtype>(tail, Vec::load(x + i));
    std::memcpy(dst + i * size, tail, static_cast<size_t>(n - i) * size);
  }
}

// n columns of x (padded) to dst.
FASTKD_FN void store_block(const float* x, int n, DType dtype, char* dst) {
  if (dtype == DType::bfloat16) return store_block_as<DType::bfloat16>(x, n, dst);
  if (dtype == DType::float16) return store_block_as<DType::float16>(x, n, dst);
  store_block_as<DType::float32>(x, n, dst);
}

}  // namespace
}  // namespace fastkd
