// Rows between two pages without access: a read or write outside is a fault, with or without a sanitizer.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <cstring>

#include "harness.h"

namespace harness {
namespace {

constexpr unsigned char kPattern = 0xA5;

size_t page() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

uint32_t bits_of_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

double half_value(uint16_t h) {
  const int exponent = (h >> 10) & 31, fraction = h & 1023;
  double x;
  if (exponent == 31) {
    x = fraction ? NAN : INFINITY;
  } else {
    x = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  }
  return h & 0x8000 ? -x : x;
}

// Nearest fp16 of a finite value in its range, or of an infinity; found by search, so that nothing of the kernels'
// conversion is repeated here.
uint16_t half_bits(double x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  uint16_t low = 0, high = 0x7c00;  // magnitudes are ordered like their bits
  while (low < high) {
    const auto middle = static_cast<uint16_t>((low + high + 1) / 2);
    if (half_value(middle) <= std::fabs(x))
      low = middle;
    else
      high = static_cast<uint16_t>(middle - 1);
  }
  return sign | low;
}

}  // namespace

GuardedRows::GuardedRows(int64_t rows, int64_t columns, int64_t row_stride, int64_t offset, fastkd::DType dtype)
    : rows_(rows), columns_(columns), stride_(row_stride), dtype_(dtype) {
  // the last row ends where the guard begins: no gap behind it
  const int64_t elements = offset + (rows > 0 ? (rows - 1) * row_stride + columns : 0);
  const size_t bytes = static_cast<size_t>(elements * fastkd::size_of(dtype));
  const size_t data = (bytes + page() - 1) / page() * page();
  mapped_ = data + 2 * page();
  void* memory = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  mapping_ = static_cast<char*>(memory);
  if (data && mprotect(mapping_ + page(), data, PROT_READ | PROT_WRITE)) std::abort();
  char* begin = mapping_ + page() + (data - bytes);
  first_ = begin + offset * fastkd::size_of(dtype);
  std::memset(mapping_ + page(), kPattern, data);
}

GuardedRows::~GuardedRows() { munmap(mapping_, mapped_); }

void GuardedRows::set(int64_t row, int64_t column, double value) {
  char* at = element(row * stride_ + column);
  if (dtype_ == fastkd::DType::float32) {
    const auto x = static_cast<float>(value);
    std::memcpy(at, &x, sizeof(x));
    return;
  }
  uint16_t bits;
  if (dtype_ == fastkd::DType::bfloat16) {
    bits = static_cast<uint16_t>(bits_of_float(static_cast<float>(value)) >> 16);
  } else {
    bits = half_bits(value);
  }
  std::memcpy(at, &bits, sizeof(bits));
}

double GuardedRows::get(int64_t row, int64_t column) const {
  const char* at = element(row * stride_ + column);
  if (dtype_ == fastkd::DType::float32) {
    float x;
    std::memcpy(&x, at, sizeof(x));
    return x;
  }
  uint16_t bits;
  std::memcpy(&bits, at, sizeof(bits));
  if (dtype_ == fastkd::DType::bfloat16) return float_of_bits(static_cast<uint32_t>(bits) << 16);
  return half_value(bits);
}

void GuardedRows::mark_gaps() {
  for (int64_t n = 0; n + 1 < rows_; ++n)
    std::memset(element(n * stride_ + columns_), kPattern,
                static_cast<size_t>((stride_ - columns_) * fastkd::size_of(dtype_)));
}

bool GuardedRows::gaps_are_marked() const {
  for (int64_t n = 0; n + 1 < rows_; ++n)
    for (const char* p = element(n * stride_ + columns_); p < element((n + 1) * stride_); ++p)
      if (static_cast<unsigned char>(*p) != kPattern) return false;
  for (const char* p = mapping_ + page(); p < first_; ++p)
    if (static_cast<unsigned char>(*p) != kPattern) return false;
  return true;
}

fastkd::Rows GuardedRows::rows() const {
  fastkd::Rows rows;
  rows.data = first_;
  rows.dtype = dtype_;
  rows.inner = rows_ > 0 ? rows_ : 1;
  rows.inner_stride = stride_;
  return rows;
}

}  // namespace harness
