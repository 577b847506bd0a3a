// The Python module of the machine's own tests, and the example of a binding.
#include "binding.h"
#include "numbers.h"
#include "selftest_phases.cuh"

namespace {

namespace py = pybind11;
using selftest::Args;
using selftest::Bug;

const std::map<std::string, void (*)(Args)> kKernels = {
    {"copy", selftest::copy},
    {"row_sums", selftest::row_sums},
    {"twice", selftest::twice},
    {"rotate", selftest::rotate},
    {"cluster_sums", selftest::cluster_sums},
    {"pipeline", selftest::pipeline},
    {"neighbours", selftest::neighbours},
    {"two_phases", selftest::two_phases},
    {"many_readers", selftest::many_readers},
};

// `in` is (rows, columns) and may be left out where the kernel works in place.
py::dict run(const std::string& name, const std::map<std::string, py::array>& arrays, int64_t rows, int64_t columns,
             Bug bug, const std::vector<std::string>& empty, const std::map<std::string, size_t>& remainder, bool front,
             const py::dict& launch) {
  simt::Arrays memory(arrays, empty, remainder, front);
  Args args;
  args.out = memory.data<float>("out");
  args.in = memory.data<const float>(arrays.count("in") ? "in" : "out");
  args.rows = rows, args.columns = columns, args.bug = bug;
  const auto kernel = kKernels.at(name);
  const simt::Report report = simt::launch(simt::config_of(launch), memory.memory, [&] { kernel(args); });
  memory.copy_back();
  return simt::dict_of(report, memory.memory);
}

}  // namespace

PYBIND11_MODULE(simt_selftest, m) {
  py::enum_<Bug> bugs(m, "Bug");
#define BUG(name) bugs.value(#name, Bug::name)
  BUG(none), BUG(missing_barrier), BUG(missing_reuse_barrier), BUG(barrier_in_branch), BUG(barrier_at_two_places);
  BUG(divergent_exit), BUG(bad_mask), BUG(differing_masks), BUG(returned_lane), BUG(shuffle_from_outside);
  BUG(uninitialised_shared), BUG(misaligned_vector), BUG(read_beyond), BUG(write_beyond), BUG(missing_wait);
  BUG(uncommitted_copy), BUG(copy_at_exit), BUG(missing_copy_barrier), BUG(copy_over_readers);
  BUG(missing_cluster_barrier), BUG(peer_exit), BUG(peer_rank), BUG(peer_address), BUG(deadlock), BUG(benign_race);
  BUG(missing_warp_sync), BUG(race_between_blocks), BUG(constant_read_of_written), BUG(write_to_input);
  BUG(raw_overrun), BUG(stack_overflow);
  BUG(phase_unmade), BUG(phase_unfenced_init), BUG(phase_made_twice), BUG(phase_unordered_init);
  BUG(phase_missing_wait), BUG(phase_wrong_parity), BUG(phase_missing_expect), BUG(phase_expect_more);
  BUG(phase_expect_less), BUG(phase_expect_too_much), BUG(phase_unarmed), BUG(phase_reuse_early);
  BUG(phase_arrive_early), BUG(phase_arrive_twice), BUG(phase_overwritten), BUG(phase_runs_ahead);
  BUG(bulk_misaligned), BUG(bulk_odd_size), BUG(bulk_source_written), BUG(bulk_at_exit), BUG(bulk_unfenced_write);
  BUG(bulk_unseen_by_peers), BUG(named_missing), BUG(named_counts), BUG(named_absent), BUG(named_zero);
  BUG(unordered_reader);
#undef BUG
  m.def("run", &run, py::arg("name"), py::arg("arrays"), py::arg("rows"), py::arg("columns"),
        py::arg("bug") = Bug::none, py::arg("empty") = std::vector<std::string>(),
        py::arg("remainder") = std::map<std::string, size_t>(), py::arg("front") = false,
        py::arg("launch") = py::dict());
  m.def("float_of_fp16", &simt::float_of_fp16);
  m.def("fp16_of_float", &simt::fp16_of_float);
  m.def("bf16_of_float", &simt::bf16_of_float);
}
