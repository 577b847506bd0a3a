// Runs a kernel on the CPU as a GPU might, and reports what it did wrong and what it moved.
//
//   simt::Memory memory;
//   simt::Buffer& in = memory.add("in", bytes, false);
//   in.fill(host);
//   simt::Buffer& out = memory.add("out", bytes);
//   simt::Config config;
//   config.grid = rows * 8, config.cluster = 8, config.threads = 384, config.shared_bytes = 65536, config.seed = 3;
//   simt::Report report = simt::launch(config, memory, [&] { kernel<...>(params); });
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "memory.h"

namespace simt {

constexpr size_t kMaxSharedBytes = 227 << 10;  // a block of sm_90 and sm_100

struct Config {
  int64_t grid = 1;          // blocks
  int cluster = 1;           // blocks a cluster
  int threads = kWarpLanes;  // a block
  size_t shared_bytes = 0;   // dynamic, a block
  uint64_t seed = 0;         // 0: warps and lanes in order, a switch only where a thread waits; else a random schedule
  size_t max_errors = 8;
};

struct Error {
  std::string check;  // which check found it: README.md lists them
  std::string text;
};

struct Report {
  std::vector<Error> errors;
  Counters total;           // of all buffers, in this launch; each buffer has its own
  size_t shared_bytes = 0;  // the most that a block touched, counted from the start of its shared memory
  int64_t block_barriers = 0, cluster_barriers = 0;  // passed, each by all its threads
  int64_t warp_meetings = 0;                         // shuffles, ballots, warp_syncs
  int64_t switches = 0;                              // from one thread to another
  uint64_t schedule = 0;                             // a hash of who ran after whom

  bool ok() const { return errors.empty(); }
  bool found(const std::string& check) const;
  std::string text() const;  // the errors, one a line
};

// `kernel` is called once by every thread of the grid. Never aborts: a launch ends with the report of what stopped it.
Report launch(const Config& config, Memory& memory, const std::function<void()>& kernel);

}  // namespace simt
