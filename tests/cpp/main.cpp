// Drives the torch-free CPU kernels on std::threads over the table of problems. Built plainly, with sanitizers, and
// from changed sources: see test_native_harness.py and test_mutation.py.
//
//   harness [quick|sparse|all] [threads] -> a line per failing problem (all: ten at most, else the first), exit status
//   1 if there is one. sparse: of quick's problems those with a sparse teacher.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../../csrc/kernels/cpu/isa.h"
#include "harness.h"

#if defined(HARNESS_KERNELS)
// One instruction set, without the choice of csrc/kernels/cpu/select.cpp that would need all of them linked.
namespace fastkd {
const CpuKernels* selected_kernels(const char** error) {
  *error = "";
  return &HARNESS_KERNELS;
}
}  // namespace fastkd
#endif

int main(int argc, char** argv) {
  const bool sparse = argc > 1 && std::strcmp(argv[1], "sparse") == 0;
  const bool quick = sparse || (argc > 1 && std::strcmp(argv[1], "quick") == 0);
  const int threads = argc > 2 ? std::atoi(argv[2]) : 4;
  int failures = 0;
  const auto problems = harness::all_problems(quick);
  for (const auto& problem : problems) {
    if (sparse && problem.k == 0) continue;
    const std::string complaint = harness::run(problem, threads);
    if (complaint.empty()) continue;
    std::printf("%s: %s\n", problem.name.c_str(), complaint.c_str());
    if (++failures == (quick ? 1 : 10)) break;
  }
  const std::string products = sparse ? "" : harness::run_products(threads);
  if (!products.empty()) {
    std::printf("products: %s\n", products.c_str());
    ++failures;
  }
  std::printf("%zu problems, %d failed\n", problems.size(), failures);
  return failures > 0;
}
