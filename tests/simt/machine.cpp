#include "machine.h"

#include <algorithm>
#include <cstring>

namespace simt {

Machine* machine = nullptr;

namespace {

StackPool stacks;
uint32_t latest_epoch = 0;  // over all launches, since shadows outlive them

}  // namespace

uint64_t Random::next() {  // splitmix64
  uint64_t z = state_ += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

Machine::Machine(const Config& config, Memory& memory, const std::function<void()>& kernel, Report& report)
    : config(config),
      memory(memory),
      report(report),
      random(config.seed),
      kernel_(kernel),
      stacks_(stacks),
      threads_(static_cast<size_t>(config.cluster * config.threads)),
      warps_(threads_.size() / kWarpLanes),
      blocks_(static_cast<size_t>(config.cluster)),
      epoch_(++latest_epoch),
      launch_epoch_(epoch_) {
  const size_t rounded = (config.shared_bytes + 15) / 16 * 16;
  for (size_t b = 0; b < blocks_.size(); ++b) {
    blocks_[b].rank = static_cast<int>(b);
    blocks_[b].shared = std::make_unique<GuardedPages>(rounded, GuardedPages::Flush::back, 0);
    blocks_[b].shadow = std::make_unique<Shadow>(rounded, Shadow::kShared);
  }
  draw_habits();
  machine = this;
}

Machine::~Machine() {
  latest_epoch = epoch_;
  machine = nullptr;
}

// How often threads are interrupted, and in which order lanes run: each seed has its own ways, since bugs differ in
// what brings them out.
void Machine::draw_habits() {
  if (config.seed == 0) {
    countdown_ = INT64_MAX;
    return;
  }
  const uint64_t periods[] = {0, 2, 8, 32, 128, 512};
  switch_every_ = periods[random.below(6)];
  lane_order_ = static_cast<int>(random.below(3));
  countdown_ = switch_every_ ? static_cast<int64_t>(random.below(2 * switch_every_)) : INT64_MAX;
}

void Machine::run() {
  std::vector<int64_t> order(static_cast<size_t>(config.grid / config.cluster));
  for (size_t c = 0; c < order.size(); ++c) order[c] = static_cast<int64_t>(c);
  for (size_t c = order.size(); config.seed && c > 1; --c) std::swap(order[c - 1], order[random.below(c)]);
  for (const int64_t cluster : order) {
    start_cluster(cluster * config.cluster);
    if (!run_cluster()) return;
  }
}

void Machine::start_cluster(int64_t first_block) {
  first_epoch_ = cluster_epoch_ = ++epoch_;
  cluster_arrived_ = returned_ = 0;
  ready_.clear();
  parts_.clear();
  for (Block& block : blocks_) start_block(block, first_block + block.rank);
}

void Machine::start_block(Block& block, int64_t index) {
  block.index = index;
  block.epoch = epoch_;
  block.arrived = block.returned = 0;
  block.peer_epoch = 0;
  block.shadow->forget_values();
  block.barriers.clear(), block.bulks.clear(), block.told_phases.clear();
  for (NamedBarrier& named : block.named) named = {};
  for (int t = 0; t < config.threads; ++t) {
    const size_t at = static_cast<size_t>(block.rank * config.threads + t);
    Thread& thread = threads_[at];
    Warp& warp = warps_[at / kWarpLanes];
    thread.block = &block, thread.warp = &warp;
    thread.index = t, thread.lane = t % kWarpLanes;
    thread.returned = false, thread.waiting = Waiting::nothing;
    thread.copies.clear(), thread.groups = 0;
    thread.heard = {}, thread.fenced = {};
    prepare(thread.context, stacks_.top(at), &Machine::enter);
    if (thread.lane) continue;
    warp.threads = &thread;
    warp.runnable = warp.returned = warp.meeting = 0;
    warp.priority = config.seed ? random.next() : UINT64_MAX - at;
    warp.forget_clocks();
    make_runnable(warp, ~0u);
  }
}

// False where the launch is to stop.
bool Machine::run_cluster() {
  if (sigsetjmp(landing_, 1) == 0) {
    self = choose();
    switch_context(main_, self->context);
  } else {
    describe_fault();
  }
  self = nullptr;
  return !stopped_;
}

void Machine::enter() {
  machine->kernel_();
  machine->leave();
}

void Machine::leave() {
  Thread& thread = *self;
  check_return(thread);
  thread.returned = true;
  thread.warp->returned |= 1u << thread.lane;
  ++thread.block->returned;
  if (++returned_ == static_cast<int>(threads_.size())) {
    switch_context(thread.context, main_);
  }
  wait(Waiting::nothing);
}

// Whom a thread that returns leaves in the lurch.
void Machine::check_return(Thread& thread) {
  Block& block = *thread.block;
  const std::string returns = name_of(thread) + " returns while ";
  for (unsigned rest = thread.warp->meeting; rest; rest &= rest - 1) {
    const Thread& other = thread.warp->threads[__builtin_ctz(rest)];
    if (!(other.mask >> thread.lane & 1)) continue;
    fail("inactive-lane", returns + name_of(other) + " waits for it at " + other.site.text());
  }
  for (const Thread& other : threads_) {
    if (!block.arrived && !cluster_arrived_) break;
    const bool in_block = other.waiting == Waiting::block && other.block == &block;
    if (!in_block && other.waiting != Waiting::cluster) continue;
    fail("divergent-barrier", returns + name_of(other) + " waits at the barrier of " + other.site.text());
  }
  if (!thread.copies.empty()) {
    note("missing-wait",
         name_of(thread) + " returns with a copy under way, issued at " + thread.copies.front().site.text());
  }
  if (block.returned + 1 == config.threads) check_bulks(block);
  if (block.returned + 1 == config.threads && block.peer_epoch && block.peer_epoch == cluster_epoch_) {
    self->site = block.peer_site;
    note("peer-exit", "block " + std::to_string(block.index) + " returns with no cluster_sync after the peer_load at " +
                          block.peer_site.text() + " from its shared memory");
  }
}

void Machine::make_runnable(Warp& warp, unsigned lanes) {
  if (!warp.runnable && lanes) ready_.push_back({warp.priority, &warp});
  warp.runnable |= lanes;
}

// Takes the running thread out of the race until someone makes it runnable again.
void Machine::wait(Waiting what) {
  Warp& warp = *self->warp;
  self->waiting = what;
  warp.runnable &= ~(1u << self->lane);
  if (!warp.runnable) {
    const auto at = std::find_if(ready_.begin(), ready_.end(), [&](const Ready& r) { return r.warp == &warp; });
    *at = ready_.back();
    ready_.pop_back();
  }
  run_next();
}

// Between two words: another thread may be given its turn.
void Machine::yield() {
  countdown_ = static_cast<int64_t>(random.below(2 * switch_every_));
  if (!self->copies.empty()) sample_copies();
  if (!parts_.empty()) land_some();
  if (random.one_in(2)) {
    const uint64_t priority = random.next();
    self->warp->priority = priority;
    for (Ready& r : ready_) {
      if (r.warp == self->warp) r.priority = priority;
    }
  }
  run_next();
}

void Machine::run_next() {
  Thread* next = choose();
  for (; !next && !parts_.empty(); next = choose()) land(random.below(parts_.size()));  // nobody else can go on
  if (!next) fail("deadlock", "no thread can go on: " + who_waits());
  if (next == self) return;
  Thread* const from = self;
  self = next;
  ++report.switches;
  report.schedule = (report.schedule ^ static_cast<uint64_t>(next - threads_.data())) * 0x100000001b3u;
  switch_context(from->context, next->context);
}

// The warp of highest priority that can run, and one of its lanes; null: nobody.
Thread* Machine::choose() {
  if (ready_.empty()) return nullptr;
  const auto higher = [](const Ready& a, const Ready& b) { return a.priority < b.priority; };
  Warp& warp = *std::max_element(ready_.begin(), ready_.end(), higher)->warp;
  unsigned lanes = warp.runnable;
  if (lane_order_ == 1) return &warp.threads[31 - __builtin_clz(lanes)];
  if (lane_order_ == 2) {
    for (uint64_t skip = random.below(static_cast<uint64_t>(__builtin_popcount(lanes))); skip; --skip)
      lanes &= lanes - 1;
  }
  return &warp.threads[__builtin_ctz(lanes)];
}

void Machine::sample_copies() {
  for (Copy& copy : self->copies) {
    if (copy.sampled || !random.one_in(2)) continue;
    std::memcpy(copy.value, copy.from, copy.bytes);
    copy.sampled = true;
  }
}

Actor Machine::actor() const {
  Actor a;
  a.thread = self->block->rank * kMaxThreads + self->index;
  a.epoch = self->block->epoch;
  a.cluster_epoch = cluster_epoch_;
  a.first_epoch = first_epoch_;
  a.launch_epoch = launch_epoch_;
  a.seen = self->warp->seen[self->lane];
  const Knowledge& heard = self->heard;
  if (!heard.clocks.empty() && heard.epoch == a.epoch) a.heard = heard.clocks.data();
  return a;
}

}  // namespace simt
