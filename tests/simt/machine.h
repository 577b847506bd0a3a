// One launch while it runs: the threads, warps and blocks of the cluster that is alive, and who runs next.
#pragma once

#include <csetjmp>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "engine.h"
#include "fiber.h"
#include "words.h"

namespace simt {

// A small random generator, the same on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next();
  uint64_t below(uint64_t n) { return next() % n; }
  bool one_in(uint64_t n) { return below(n) == 0; }

 private:
  uint64_t state_;
};

struct Copy {
  size_t to;         // offset in the block's shared memory
  const char* from;  // global
  size_t bytes;
  int group;
  bool sampled;  // whether the source has been read
  uint32_t value[4];
  Site site;
};

struct Warp;
struct Block;

enum class Waiting { nothing, warp, block, cluster, phase, named };

// What a thread has heard of others by barriers that not the whole block passes.
struct Knowledge {
  uint32_t epoch = 0;            // the block's when `clocks` was noted; older: the block has passed a barrier since
  std::vector<uint16_t> clocks;  // of the block's threads; empty: none
  std::vector<uint32_t> phases;  // of the block's phase barriers, as many as are known to have ended

  void join(const Knowledge& other);
  bool empty() const { return clocks.empty() && phases.empty(); }
};

// A time of one thread.
struct Stamp {
  int thread = 0;  // Actor::thread
  uint32_t epoch = 0;
  uint16_t clock = 0;

  bool before(const Stamp& other) const {
    return epoch < other.epoch || (epoch == other.epoch && thread == other.thread && clock < other.clock);
  }
};

struct PhaseBarrier {
  size_t offset;  // in the block's shared memory
  int arrivals, pending;
  int64_t bytes = 0;     // expected and not brought yet; negative: brought before they were expected
  uint32_t phase = 0;    // that runs
  uint32_t awaited = 0;  // phases whose end some thread has waited for
  int resuming = 0;      // threads that its latest phase released and that have not run since
  Knowledge gathered, released;
  Stamp made;
  Site site;
};

// A bulk copy, kept for as long as its block lives.
struct Bulk {
  size_t to;
  const char* from;
  size_t bytes, left;  // left: not brought yet
  int barrier;
  uint32_t phase;
  Site site;
};
// A part of one, which may land before or after the others.
struct BulkPart {
  Block* block;
  size_t bulk, offset, bytes;
};

struct NamedBarrier {
  int threads = 0, arrived = 0;
  Knowledge gathered;
  Site site;
};
constexpr int kNamedBarriers = 16;

struct Thread {
  Context context;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int index = 0;  // of the block
  int lane = 0;
  bool returned = false;
  Waiting waiting = Waiting::nothing;
  Site site;  // of the latest word
  Meeting meeting = Meeting::sync;
  unsigned mask = 0;
  int partner = 0;
  uint64_t value = 0;  // brought to a meeting, and taken from it
  std::vector<Copy> copies;
  int groups = 0;  // of copies, committed
  Knowledge heard;
  Stamp fenced;    // its latest fence_async
  int awaits = 0;  // a phase or named barrier of its block
};

struct Warp {
  Thread* threads = nullptr;
  unsigned runnable = 0, returned = 0, meeting = 0;  // lanes
  uint64_t priority = 0;
  uint16_t seen[kWarpLanes][kWarpLanes];  // vector clocks since the latest barrier of the block, advanced by warp_sync
  bool clocks_advanced = true;

  void forget_clocks();
};

struct Block {
  int rank = 0;  // in its cluster
  int64_t index = 0;
  std::unique_ptr<GuardedPages> shared;
  std::unique_ptr<Shadow> shadow;
  uint32_t epoch = 0;
  int arrived = 0;  // at the block barrier
  int returned = 0;
  uint32_t peer_epoch = 0;  // when another block last read its shared memory, and where
  Site peer_site;
  std::vector<PhaseBarrier> barriers;
  std::vector<Bulk> bulks;
  std::vector<uint32_t> told_phases;  // of its phase barriers, ended by the cluster's latest barrier
  NamedBarrier named[kNamedBarriers];
};

class Machine {
 public:
  Machine(const Config& config, Memory& memory, const std::function<void()>& kernel, Report& report);
  ~Machine();
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;

  void run();

  // For the words, on behalf of self.
  Thread* self = nullptr;
  const Config& config;
  Memory& memory;
  Report& report;
  Random random;
  void step(Site site) {
    self->site = site;
    if (countdown_-- <= 0) yield();
  }
  void block_barrier(Site site);
  void cluster_barrier(Site site);
  uint64_t meet(Meeting kind, unsigned mask, uint64_t value, int lane, Site site);
  void named_barrier(int id, int threads, bool waits, Site site);
  void init_phases(size_t offset, int arrivals);
  void arrive_at(size_t offset, int64_t bytes);
  void wait_for_phase(size_t offset, int parity);
  void issue_bulk(size_t to, const char* from, size_t bytes, size_t barrier);
  void fence_async();
  Actor actor() const;
  Stamp now() const;
  bool fenced(const Stamp& write) const;
  const Bulk* unheard_bulk(const Block& block, size_t offset, size_t bytes) const;
  const Bulk* unheard_source(const void* address, size_t bytes) const;
  Block& block(int rank) { return blocks_[static_cast<size_t>(rank)]; }
  int blocks() const { return config.cluster; }

  // Notes an error that the thread survives, once for each place. `fail` also ends the launch and never returns.
  void note(const std::string& check, const std::string& text);
  [[noreturn]] void fail(const std::string& check, const std::string& text);
  void note_race(const Conflict& conflict, bool writes, const std::string& where);
  std::string name_of(const Thread& thread) const;
  std::string name_of(int actor_thread) const;
  bool at_fault(void* address);  // from the signal handler; false: not a fault of a kernel

 private:
  struct Ready {
    uint64_t priority;
    Warp* warp;
  };

  void start_cluster(int64_t first_block);
  void start_block(Block& block, int64_t index);
  void draw_habits();
  bool run_cluster();
  static void enter();
  void leave();
  void check_return(Thread& thread);

  void make_runnable(Warp& warp, unsigned lanes);
  void wait(Waiting what);
  void yield();
  void run_next();
  Thread* choose();
  void release(Block& block);
  void check_company(const Thread& other, const char* barrier);
  void complete(Warp& warp, unsigned mask, Meeting kind);
  void join_clocks(Warp& warp, unsigned mask);
  void tick(Thread& thread);
  Knowledge knowledge() const;
  void learn(Thread& thread, const Knowledge& news);
  void share_phases(Block& block, bool with_cluster);
  size_t barrier_at(size_t offset, const char* word);
  void end_phase(Block& block, size_t barrier);
  void land(size_t part);
  void land_some();
  void check_bulks(const Block& block);
  [[noreturn]] void abandon();
  void describe_fault();
  std::string who_waits() const;
  void sample_copies();

  const std::function<void()>& kernel_;
  StackPool& stacks_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<Block> blocks_;
  std::vector<Ready> ready_;
  Context main_;
  Thread* cluster_first_ = nullptr;  // the thread that reached the cluster barrier first
  int cluster_arrived_ = 0;
  std::vector<BulkPart> parts_;  // under way
  int returned_ = 0;
  uint32_t epoch_, launch_epoch_, first_epoch_ = 0, cluster_epoch_ = 0;
  std::set<std::pair<std::string, uint64_t>> noted_;

  // Habits of a schedule, drawn from its seed.
  int64_t countdown_ = 0;
  uint64_t switch_every_ = 0;  // words between two switches, about; 0: never
  int lane_order_ = 0;         // 0 lowest first, 1 highest first, 2 random

  sigjmp_buf landing_;
  bool stopped_ = false;
  void* volatile fault_ = nullptr;
};

extern Machine* machine;  // the launch that runs; null: none

}  // namespace simt
