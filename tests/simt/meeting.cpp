// Barriers and the collectives of a warp.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "machine.h"

namespace simt {

namespace {

const char* word(Meeting kind) {
  switch (kind) {
    case Meeting::sync: return "warp_sync";
    case Meeting::ballot: return "ballot";
    case Meeting::shuffle: return "shuffle";
    default: return "shuffle_xor";
  }
}

std::string hex(unsigned mask) {
  char text[16];
  snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

}  // namespace

// Barrier at two places at once: `other` waits for the first of them.
void Machine::check_company(const Thread& other, const char* barrier) {
  if (other.site == self->site) return;
  fail("divergent-barrier", name_of(*self) + " calls " + barrier + " at " + self->site.text() + " while " +
                                name_of(other) + " waits at " + other.site.text());
}

void Machine::release(Block& block) {
  share_phases(block, false);
  const size_t first = static_cast<size_t>(block.rank * config.threads);
  for (size_t t = first; t < first + static_cast<size_t>(config.threads); ++t) {
    threads_[t].waiting = Waiting::nothing;
    if (threads_[t].lane) continue;
    threads_[t].warp->forget_clocks();
    make_runnable(*threads_[t].warp, ~0u);
  }
}

void Machine::block_barrier(Site site) {
  step(site);
  Block& block = *self->block;
  if (block.returned) {
    fail("divergent-barrier", name_of(*self) + " calls block_sync at " + site.text() + " after " +
                                  std::to_string(block.returned) + " threads of the block have returned");
  }
  const size_t first = static_cast<size_t>(block.rank * config.threads);
  if (block.arrived) {
    for (size_t t = first; t < first + static_cast<size_t>(config.threads); ++t) {
      if (threads_[t].waiting != Waiting::block) continue;
      check_company(threads_[t], "block_sync");  // those that wait agree with each other
      break;
    }
  }
  if (++block.arrived < config.threads) return wait(Waiting::block);
  block.arrived = 0;
  block.epoch = ++epoch_;
  ++report.block_barriers;
  self->waiting = Waiting::nothing;
  release(block);
  if (config.seed) run_next();
}

void Machine::cluster_barrier(Site site) {
  step(site);
  for (const Block& block : blocks_) {
    if (!block.returned) continue;
    fail("divergent-barrier", name_of(*self) + " calls cluster_sync at " + site.text() + " after " +
                                  std::to_string(block.returned) + " threads of block " + std::to_string(block.index) +
                                  " have returned");
  }
  if (cluster_arrived_) {
    check_company(*cluster_first_, "cluster_sync");
  } else {
    cluster_first_ = self;
  }
  if (++cluster_arrived_ < static_cast<int>(threads_.size())) return wait(Waiting::cluster);
  cluster_arrived_ = 0;
  cluster_epoch_ = ++epoch_;
  ++report.cluster_barriers;
  self->waiting = Waiting::nothing;
  for (Block& block : blocks_) {
    block.epoch = epoch_;
    share_phases(block, true);
    release(block);
  }
  if (config.seed) run_next();
}

uint64_t Machine::meet(Meeting kind, unsigned mask, uint64_t value, int lane, Site site) {
  step(site);
  Warp& warp = *self->warp;
  const unsigned own = 1u << self->lane;
  const auto what = [&] { return std::string(word(kind)) + "(" + hex(mask) + ") at " + site.text(); };
  if (!(mask & own)) fail("bad-mask", name_of(*self) + " is not in the mask of its own " + what());
  if (mask & warp.returned) {
    fail("inactive-lane",
         name_of(*self) + " waits in " + what() + " for lanes " + hex(mask & warp.returned) + ", which have returned");
  }
  for (unsigned rest = warp.meeting & mask; rest; rest &= rest - 1) {
    const Thread& other = warp.threads[__builtin_ctz(rest)];
    if (other.mask == mask && other.meeting == kind && other.site == site) continue;
    fail(other.mask == mask ? "divergent-warp" : "bad-mask", name_of(*self) + " calls " + what() + " while " +
                                                                 name_of(other) + " waits in " + word(other.meeting) +
                                                                 "(" + hex(other.mask) + ") at " + other.site.text());
  }
  self->meeting = kind, self->mask = mask, self->value = value, self->partner = lane;
  warp.meeting |= own;
  if ((warp.meeting & mask) != mask) {
    wait(Waiting::warp);
    return self->value;
  }
  complete(warp, mask, kind);
  for (unsigned rest = mask; rest; rest &= rest - 1) warp.threads[__builtin_ctz(rest)].waiting = Waiting::nothing;
  warp.meeting &= ~mask;
  make_runnable(warp, mask);
  ++report.warp_meetings;
  return self->value;
}

void Warp::forget_clocks() {
  if (!clocks_advanced) return;
  clocks_advanced = false;
  std::memset(seen, 0, sizeof seen);
  for (int lane = 0; lane < kWarpLanes; ++lane) seen[lane][lane] = 1;
}

// Gives each lane of `mask` what it came for.
void Machine::complete(Warp& warp, unsigned mask, Meeting kind) {
  uint64_t brought[kWarpLanes];
  unsigned votes = 0;
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    brought[lane] = warp.threads[lane].value;
    if (brought[lane]) votes |= 1u << lane;
  }
  if (kind == Meeting::sync) join_clocks(warp, mask);
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    Thread& thread = warp.threads[__builtin_ctz(rest)];
    if (kind == Meeting::sync) continue;
    if (kind == Meeting::ballot) {
      thread.value = votes & mask;
      continue;
    }
    const int source = kind == Meeting::shuffle ? thread.partner : thread.lane ^ thread.partner;
    if (source < 0 || source >= kWarpLanes || !(mask >> source & 1)) {
      fail("shuffle-source", name_of(thread) + " takes the value of lane " + std::to_string(source) + " in " +
                                 word(kind) + "(" + hex(mask) + ") at " + thread.site.text() + ": not in the mask");
    }
    thread.value = brought[source];
  }
}

// A time of the thread ends: what it does from now on is not known to those who heard of it before.
void Machine::tick(Thread& thread) {
  thread.warp->clocks_advanced = true;
  if (++thread.warp->seen[thread.lane][thread.lane] == UINT16_MAX)
    fail("limit", "65534 warp_syncs or arrivals of a thread between two block barriers");
}

// After it every lane of `mask` has seen what any of them had seen or done.
void Machine::join_clocks(Warp& warp, unsigned mask) {
  uint16_t joined[kWarpLanes] = {};
  Knowledge heard;
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    const uint16_t* seen = warp.seen[__builtin_ctz(rest)];
    for (int k = 0; k < kWarpLanes; ++k) joined[k] = std::max(joined[k], seen[k]);
    heard.join(warp.threads[__builtin_ctz(rest)].heard);
  }
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    std::copy(joined, joined + kWarpLanes, warp.seen[lane]);
    tick(warp.threads[lane]);
    if (!heard.empty()) warp.threads[lane].heard.join(heard);
  }
}

}  // namespace simt
