// Barriers of which a block may have many: phase barriers in shared memory (mbarrier), named barriers; and the bulk
// copies that arrive at the former. What they order, they order between those who meet there: Knowledge.
#include <algorithm>
#include <cstring>

#include "machine.h"

namespace simt {

namespace {

constexpr int64_t kMostBytes = (1 << 20) - 1;  // that a phase can expect
constexpr int kMostArrivals = (1 << 20) - 1;

std::string phase_text(const PhaseBarrier& b) {
  return "phase " + std::to_string(b.phase) + " of the barrier made at " + b.site.text() + ", which lacks " +
         std::to_string(b.pending) + " arrivals and " + std::to_string(b.bytes) + " bytes";
}

}  // namespace

void Knowledge::join(const Knowledge& other) {
  if (other.epoch > epoch) clocks.clear(), epoch = other.epoch;
  if (other.epoch == epoch) {
    clocks.resize(std::max(clocks.size(), other.clocks.size()));
    for (size_t t = 0; t < other.clocks.size(); ++t) clocks[t] = std::max(clocks[t], other.clocks[t]);
  }
  phases.resize(std::max(phases.size(), other.phases.size()));
  for (size_t b = 0; b < other.phases.size(); ++b) phases[b] = std::max(phases[b], other.phases[b]);
}

// All that the running thread has done or heard of since its block's latest barrier.
Knowledge Machine::knowledge() const {
  Knowledge own;
  own.epoch = self->block->epoch;
  own.clocks.resize(static_cast<size_t>(config.threads));
  const uint16_t* seen = self->warp->seen[self->lane];
  std::copy(seen, seen + kWarpLanes, own.clocks.begin() + (self->index - self->lane));
  own.join(self->heard);
  return own;
}

void Machine::learn(Thread& thread, const Knowledge& news) {
  thread.heard.join(news);
  if (news.epoch != thread.block->epoch || news.clocks.empty()) return;
  uint16_t* seen = thread.warp->seen[thread.lane];
  const uint16_t* told = news.clocks.data() + (thread.index - thread.lane);
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    if (lane != thread.lane) seen[lane] = std::max(seen[lane], told[lane]);
  }
  thread.warp->clocks_advanced = true;
}

// What a barrier of the whole block, or cluster, makes known of phases.
void Machine::share_phases(Block& block, bool with_cluster) {
  if (block.barriers.empty()) return;
  const size_t first = static_cast<size_t>(block.rank * config.threads);
  Knowledge all;
  for (int t = 0; t < config.threads; ++t) all.join(threads_[first + static_cast<size_t>(t)].heard);
  for (int t = 0; t < config.threads; ++t) threads_[first + static_cast<size_t>(t)].heard.phases = all.phases;
  if (with_cluster) block.told_phases = all.phases;
}

Stamp Machine::now() const {
  return {self->block->rank * kMaxThreads + self->index, self->block->epoch, self->warp->seen[self->lane][self->lane]};
}

// Whether copies that the running thread issues come behind the write: its thread has fenced it, or this one has, after
// a barrier of the block.
bool Machine::fenced(const Stamp& write) const {
  const size_t writer = static_cast<size_t>(write.thread / kMaxThreads * config.threads + write.thread % kMaxThreads);
  return write.before(threads_[writer].fenced) || write.epoch < self->fenced.epoch;
}

void Machine::fence_async() {
  tick(*self);
  self->fenced = now();
}

size_t Machine::barrier_at(size_t offset, const char* word) {
  const std::vector<PhaseBarrier>& all = self->block->barriers;
  const auto at = std::find_if(all.begin(), all.end(), [&](const PhaseBarrier& b) { return b.offset == offset; });
  if (at != all.end()) return static_cast<size_t>(at - all.begin());
  fail("uninitialised", name_of(*self) + ": " + word + " at " + self->site.text() + ": no barrier was made at byte " +
                            std::to_string(offset) + " of shared memory");
}

void Machine::init_phases(size_t offset, int arrivals) {
  Block& block = *self->block;
  for (const PhaseBarrier& b : block.barriers) {
    if (b.offset != offset) continue;
    fail("barrier-state", name_of(*self) + ": phases_init at " + self->site.text() + " of " + phase_text(b));
  }
  if (arrivals < 1 || arrivals > kMostArrivals) {
    fail("barrier-count", name_of(*self) + ": phases_init at " + self->site.text() + " for " +
                              std::to_string(arrivals) + " arrivals; allowed: 1 to " + std::to_string(kMostArrivals));
  }
  PhaseBarrier made;
  made.offset = offset, made.arrivals = made.pending = arrivals;
  made.made = now(), made.site = self->site;
  block.barriers.push_back(made);
}

void Machine::arrive_at(size_t offset, int64_t bytes) {
  Block& block = *self->block;
  const size_t at = barrier_at(offset, bytes ? "phases_arrive_expecting" : "phases_arrive");
  PhaseBarrier& b = block.barriers[at];
  if (b.pending == 0) {
    fail("barrier-count", name_of(*self) + " arrives at " + self->site.text() + ": one more than the " +
                              std::to_string(b.arrivals) + " of " + phase_text(b));
  }
  b.bytes += bytes;
  if (bytes < 0 || b.bytes > kMostBytes) {
    fail("barrier-bytes", name_of(*self) + " expects " + std::to_string(bytes) + " bytes at " + self->site.text() +
                              "; allowed: up to " + std::to_string(kMostBytes) + " a phase");
  }
  b.gathered.join(knowledge());
  tick(*self);
  if (--b.pending == 0 && b.bytes < 0) {
    note("barrier-bytes", name_of(*self) + " arrives last at " + self->site.text() + " in " + phase_text(b) +
                              ": copies have brought more than was expected");
  }
  end_phase(block, at);
}

// If it has all that it waits for.
void Machine::end_phase(Block& block, size_t barrier) {
  PhaseBarrier& b = block.barriers[barrier];
  if (b.pending || b.bytes) return;
  for (const Bulk& bulk : block.bulks) {
    if (bulk.barrier != static_cast<int>(barrier) || bulk.phase != b.phase || !bulk.left) continue;
    note("barrier-bytes", phase_text(b) + ", ends while " + std::to_string(bulk.left) +
                              " bytes of the copy issued at " + bulk.site.text() + " are under way");
  }
  if (b.resuming) {
    note("phase-missed", phase_text(b) + ", ends before " + std::to_string(b.resuming) +
                             " threads that waited for the phase before it could see that one's end");
  }
  ++b.phase;
  b.pending = b.arrivals;
  b.released = std::move(b.gathered);
  b.gathered = {};
  b.released.phases.resize(std::max(b.released.phases.size(), barrier + 1));
  b.released.phases[barrier] = b.phase;
  const size_t first = static_cast<size_t>(block.rank * config.threads);
  for (size_t t = first; t < first + static_cast<size_t>(config.threads); ++t) {
    Thread& thread = threads_[t];
    if (thread.waiting != Waiting::phase || thread.awaits != static_cast<int>(barrier)) continue;
    thread.waiting = Waiting::nothing;
    make_runnable(*thread.warp, 1u << thread.lane);
    ++b.resuming;
  }
}

void Machine::wait_for_phase(size_t offset, int parity) {
  Block& block = *self->block;
  const size_t at = barrier_at(offset, "phases_wait");
  if (static_cast<int>(block.barriers[at].phase & 1) == (parity & 1)) {
    self->awaits = static_cast<int>(at);
    wait(Waiting::phase);
    --block.barriers[at].resuming;
  }
  PhaseBarrier& b = block.barriers[at];
  b.awaited = std::max(b.awaited, b.phase);
  learn(*self, b.released);
}

// The copy engine brings it in parts, which land in any order from now on, and nobody is told but the barrier.
void Machine::issue_bulk(size_t to, const char* from, size_t bytes, size_t barrier) {
  Block& block = *self->block;
  const size_t at = barrier_at(barrier, "copy_bulk");
  if (!fenced(block.barriers[at].made)) {
    note("missing-fence", name_of(*self) + ": copy_bulk at " + self->site.text() + " to the barrier made at " +
                              block.barriers[at].site.text() + " with no fence_async between");
  }
  for (Bulk& old : block.bulks) {  // one that this one replaces
    if (!old.left && old.to >= to && old.to + old.bytes <= to + bytes) old.bytes = 0;
  }
  block.bulks.push_back({to, from, bytes, bytes, static_cast<int>(at), block.barriers[at].phase, self->site});
  const size_t pieces = config.seed ? 1 + random.below(std::min<uint64_t>(bytes / 16, 3)) : 1;
  for (size_t k = 0; k < pieces; ++k) {
    const size_t begin = bytes / 16 * k / pieces * 16, end = bytes / 16 * (k + 1) / pieces * 16;
    parts_.push_back({&block, block.bulks.size() - 1, begin, end - begin});
  }
}

void Machine::land(size_t part) {
  const BulkPart p = parts_[part];
  parts_[part] = parts_.back();
  parts_.pop_back();
  Block& block = *p.block;
  Bulk& bulk = block.bulks[p.bulk];
  std::memcpy(block.shared->data() + bulk.to + p.offset, bulk.from + p.offset, p.bytes);
  block.shadow->set_under_way(bulk.to + p.offset, p.bytes, false);
  block.shadow->set_initialised(bulk.to + p.offset, p.bytes);
  bulk.left -= p.bytes;
  PhaseBarrier& barrier = block.barriers[static_cast<size_t>(bulk.barrier)];
  barrier.bytes -= static_cast<int64_t>(p.bytes);
  if (!barrier.pending && barrier.bytes < 0) {
    note("barrier-bytes",
         phase_text(barrier) + ": the copy issued at " + bulk.site.text() + " has brought more than was expected");
  }
  end_phase(block, static_cast<size_t>(bulk.barrier));
}

void Machine::land_some() {
  while (!parts_.empty() && random.one_in(2)) land(random.below(parts_.size()));
}

// A copy into these bytes of the block's shared memory whose end the running thread has not heard of.
const Bulk* Machine::unheard_bulk(const Block& block, size_t offset, size_t bytes) const {
  const std::vector<uint32_t>& phases = &block == self->block ? self->heard.phases : block.told_phases;
  for (const Bulk& bulk : block.bulks) {
    if (!bulk.bytes || offset >= bulk.to + bulk.bytes || bulk.to >= offset + bytes) continue;
    const auto barrier = static_cast<size_t>(bulk.barrier);
    if (barrier >= phases.size() || phases[barrier] <= bulk.phase) return &bulk;
  }
  return nullptr;
}

// The same of a copy from these bytes of global memory, by any block of the cluster.
const Bulk* Machine::unheard_source(const void* address, size_t bytes) const {
  const char* const begin = static_cast<const char*>(address);
  for (const Block& block : blocks_) {
    const std::vector<uint32_t>& phases = &block == self->block ? self->heard.phases : block.told_phases;
    for (const Bulk& bulk : block.bulks) {
      if (!bulk.bytes || begin >= bulk.from + bulk.bytes || bulk.from >= begin + bytes) continue;
      const auto barrier = static_cast<size_t>(bulk.barrier);
      if (barrier >= phases.size() || phases[barrier] <= bulk.phase) return &bulk;
    }
  }
  return nullptr;
}

// As the block's last thread returns.
void Machine::check_bulks(const Block& block) {
  for (const Bulk& bulk : block.bulks) {
    if (block.barriers[static_cast<size_t>(bulk.barrier)].awaited > bulk.phase) continue;
    note("missing-wait", "block " + std::to_string(block.index) +
                             " returns and nobody has waited for the copy issued at " + bulk.site.text());
  }
}

void Machine::named_barrier(int id, int threads, bool waits, Site site) {
  step(site);
  Block& block = *self->block;
  const std::string what = name_of(*self) + (waits ? ": named_sync(" : ": named_arrive(") + std::to_string(id) + ", " +
                           std::to_string(threads) + ") at " + site.text();
  if (id < 1 || id >= kNamedBarriers || threads < kWarpLanes || threads % kWarpLanes || threads > config.threads)
    fail("barrier-count", what + "; allowed: 1 to 15, and multiples of 32 up to the block's threads");
  NamedBarrier& b = block.named[id];
  if (b.arrived && b.threads != threads) {
    fail("divergent-barrier", what + " while " + std::to_string(b.arrived) + " threads have come for " +
                                  std::to_string(b.threads) + " at " + b.site.text());
  }
  b.threads = threads, b.site = site;
  b.gathered.join(knowledge());
  tick(*self);
  self->awaits = id;
  if (++b.arrived < threads) {
    if (waits) wait(Waiting::named);
    return;
  }
  const size_t first = static_cast<size_t>(block.rank * config.threads);
  for (size_t t = first; t < first + static_cast<size_t>(config.threads); ++t) {
    Thread& thread = threads_[t];
    if (thread.waiting != Waiting::named || thread.awaits != id) continue;
    thread.waiting = Waiting::nothing;
    learn(thread, b.gathered);
    make_runnable(*thread.warp, 1u << thread.lane);
  }
  if (waits) learn(*self, b.gathered);
  b = {};
}

}  // namespace simt
