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

enum class Waiting { nothing, warp, block, cluster };

struct Warp;
struct Block;

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
  Actor actor() const;
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
