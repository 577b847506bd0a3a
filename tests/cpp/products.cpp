// What stands between the products of the linear loss: sums and transposes of matrices between guard pages, exact.
#include <cmath>
#include <sstream>

#include "../../csrc/kernels/cpu/products_launch.h"
#include "harness.h"

namespace harness {
namespace {

using fastkd::DType;

struct Shape {
  int64_t rows, columns, gap;
};
constexpr Shape kShapes[] = {{1, 1, 0}, {3, 15, 2}, {16, 16, 0}, {17, 33, 5}, {40, 257, 1}, {300, 700, 3}};

// Of 7 bits and a few powers of two: exact in bf16, and so are sums of two in fp32.
double value_at(int64_t row, int64_t column) {
  const int64_t mixed = (row * 131 + column * 17) % 255 - 127;
  return std::ldexp(static_cast<double>(mixed), static_cast<int>((row + column) % 5) - 3);
}

bool adds(const Shape& s, const fastkd::Executor& executor) {
  GuardedRows total(s.rows, s.columns, s.columns + s.gap, 3, DType::float32);
  GuardedRows product(s.rows, s.columns, s.columns + s.gap, 1, DType::bfloat16);
  for (int64_t n = 0; n < s.rows; ++n)
    for (int64_t i = 0; i < s.columns; ++i) {
      total.set(n, i, value_at(i, n) + 0.125);
      product.set(n, i, value_at(n, i));
    }
  fastkd::run_add_cpu({s.rows, s.columns, total.rows(), product.rows()}, executor);
  for (int64_t n = 0; n < s.rows; ++n)
    for (int64_t i = 0; i < s.columns; ++i)
      if (total.get(n, i) != value_at(i, n) + 0.125 + value_at(n, i)) return false;
  return total.gaps_are_marked();
}

// Rounded by the container itself, to nearest, ties to even: a fraction of a third of a step and of a half.
double rounded(double x, DType dtype) {
  if (dtype == DType::float32) return x;
  const double step = std::ldexp(1, std::ilogb(x) - (dtype == DType::bfloat16 ? 7 : 10));
  return std::nearbyint(x / step) * step;
}

bool turns(const Shape& s, DType dtype, const fastkd::Executor& executor) {
  GuardedRows result(s.rows, s.columns, s.columns + s.gap, 1, dtype);
  GuardedRows sum(s.columns, s.rows, s.rows + s.gap, 2, DType::float32);
  const auto value = [](int64_t v, int64_t h) {
    return 1 + static_cast<double>((v * 769 + h * 31) % 4096) / 4096;  // ties and all between, in either dtype
  };
  for (int64_t v = 0; v < s.rows; ++v)
    for (int64_t h = 0; h < s.columns; ++h) sum.set(h, v, value(v, h));
  fastkd::run_turn_cpu({s.rows, s.columns, result.rows(), sum.rows()}, executor);
  for (int64_t v = 0; v < s.rows; ++v)
    for (int64_t h = 0; h < s.columns; ++h)
      if (result.get(v, h) != rounded(value(v, h), dtype)) return false;
  return result.gaps_are_marked();
}

}  // namespace

std::string run_products(const fastkd::Executor& executor) {
  std::ostringstream wrong;
  for (const Shape& s : kShapes) {
    if (!adds(s, executor)) wrong << "sum of " << s.rows << " x " << s.columns << "; ";
    for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16})
      if (!turns(s, dtype, executor)) wrong << "transpose " << s.rows << " x " << s.columns << "; ";
  }
  return wrong.str();
}

}  // namespace harness
