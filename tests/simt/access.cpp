// Words that read and write memory, and the plain questions of a thread.
#include <algorithm>
#include <cstring>

#include "machine.h"

namespace simt {

namespace {

std::string bytes_text(size_t bytes) { return std::to_string(bytes) + " bytes"; }

// Where `address` lies in the block's shared memory; ends the launch where it does not.
size_t shared_offset(const void* address, Extent extent, const char* word) {
  const size_t bytes = extent.size;
  Machine& m = *machine;
  const Block& block = *m.self->block;
  const size_t size = m.config.shared_bytes;
  const auto at = reinterpret_cast<uintptr_t>(address), base = reinterpret_cast<uintptr_t>(block.shared->data());
  const auto who = [&] {
    return m.name_of(*m.self) + ": " + word + " of " + bytes_text(bytes) + " at " + m.self->site.text();
  };
  if (at >= base && at - base <= size && bytes <= size - (at - base)) {
    if (at % extent.align) {
      m.fail("misaligned",
             who() + " is not aligned to " + bytes_text(extent.align) + ": byte " + std::to_string(at - base));
    }
    m.report.shared_bytes = std::max(m.report.shared_bytes, at - base + bytes);
    return at - base;
  }
  for (int rank = 0; rank < m.blocks(); ++rank) {
    const Block& other = m.block(rank);
    if (rank == block.rank || !other.shared->holds(address)) continue;
    m.fail("shared-bounds", who() + ": the address is that of another block of the cluster");
  }
  m.fail("shared-bounds",
         who() + ": " + place_of(address, block.shared->data(), size) + " the shared memory of " + bytes_text(size));
}

void note_shared_race(const Block& block, const Conflict& conflict, bool writes) {
  if (!conflict.found) return;
  machine->note_race(conflict, writes, "the shared memory of block " + std::to_string(block.index));
}

void note_global_race(const Buffer& buffer, const Conflict& conflict, bool writes) {
  if (conflict.found) machine->note_race(conflict, writes, "'" + buffer.name + "'");
}

// A read of initialised bytes on which no copy is under way; returns where they lie.
const char* check_shared_read(Block& block, size_t offset, size_t bytes, const char* word) {
  Machine& m = *machine;
  const auto where = [&] {
    return word + std::string(" at ") + m.self->site.text() + " of byte " + std::to_string(offset) + " of block " +
           std::to_string(block.index);
  };
  if (block.shadow->under_way(offset, bytes)) {
    m.note("missing-wait", m.name_of(*m.self) + ": " + where() + " while a copy there is under way");
  } else if (block.shadow->by_bulk(offset, bytes) && m.unheard_bulk(block, offset, bytes)) {
    m.note("missing-wait", m.name_of(*m.self) + ": " + where() + ", not having waited for the copy issued at " +
                               m.unheard_bulk(block, offset, bytes)->site.text());
  } else if (!block.shadow->initialised(offset, bytes)) {
    m.note("uninitialised", m.name_of(*m.self) + ": " + where() + ", which nobody has written");
  }
  note_shared_race(block, block.shadow->record(offset, bytes, false, m.actor(), m.self->site), false);
  return block.shared->data() + offset;
}

void check_not_under_way(const Block& block, size_t offset, size_t bytes, const char* word) {
  Machine& m = *machine;
  const bool under_way = block.shadow->under_way(offset, bytes);
  if (!under_way && !(block.shadow->by_bulk(offset, bytes) && m.unheard_bulk(block, offset, bytes))) return;
  m.note("missing-wait", m.name_of(*m.self) + ": " + word + " at " + m.self->site.text() + " to byte " +
                             std::to_string(offset) + " of block " + std::to_string(block.index) +
                             (under_way ? " while a copy there is under way" : ", not having waited for a copy there"));
}

void check_shared_write(size_t offset, size_t bytes, const char* word) {
  Machine& m = *machine;
  Block& block = *m.self->block;
  check_not_under_way(block, offset, bytes, word);
  for (size_t k = 0; k < block.barriers.size(); ++k) {
    const PhaseBarrier& b = block.barriers[k];
    if (b.offset >= offset + bytes || offset >= b.offset + sizeof(uint64_t)) continue;
    m.fail("barrier-state", m.name_of(*m.self) + ": " + word + " at " + m.self->site.text() +
                                " over the barrier made at " + b.site.text());
  }
  note_shared_race(block, block.shadow->record(offset, bytes, true, m.actor(), m.self->site), true);
}

Buffer& find_global(const void* address, Extent extent, const char* word) {
  Machine& m = *machine;
  const auto who = [&] {
    return m.name_of(*m.self) + ": " + word + " of " + bytes_text(extent.size) + " at " + m.self->site.text();
  };
  if (reinterpret_cast<uintptr_t>(address) % extent.align) {
    m.fail("misaligned", who() + " is not aligned to " + bytes_text(extent.align) + ": " + m.memory.describe(address));
  }
  Buffer* const buffer = m.memory.find(address, extent.size);
  if (!buffer) m.fail("global-bounds", who() + " starts " + m.memory.describe(address));
  return *buffer;
}

void check_global_read(Buffer& buffer, size_t offset, size_t bytes, const char* word) {
  Machine& m = *machine;
  if (!buffer.shadow.initialised(offset, bytes)) {
    m.note("uninitialised", m.name_of(*m.self) + ": " + word + " at " + m.self->site.text() + " of byte " +
                                std::to_string(offset) + " of '" + buffer.name + "', which nobody has written");
  }
  note_global_race(buffer, buffer.shadow.record(offset, bytes, false, m.actor(), m.self->site), false);
}

size_t offset_in(const Buffer& buffer, const void* address) {
  return static_cast<size_t>(static_cast<const char*>(address) - buffer.data());
}

}  // namespace

int thread_index() { return machine->self->index; }
int block_threads() { return machine->config.threads; }
int64_t block_index() { return machine->self->block->index; }
int64_t grid_blocks() { return machine->config.grid; }
int cluster_rank() { return machine->self->block->rank; }
int cluster_blocks() { return machine->config.cluster; }
void block_barrier(Site site) { machine->block_barrier(site); }
void cluster_barrier(Site site) { machine->cluster_barrier(site); }
uint64_t meet(Meeting kind, unsigned mask, uint64_t value, int lane, Site site) {
  return machine->meet(kind, mask, value, lane, site);
}

char* shared_memory() { return machine->self->block->shared->data(); }

void read_shared(void* value, const void* from, Extent extent, Site site) {
  const size_t bytes = extent.size;
  machine->step(site);
  const size_t offset = shared_offset(from, extent, "shared_load");
  std::memcpy(value, check_shared_read(*machine->self->block, offset, bytes, "shared_load"), bytes);
}

void write_shared(void* to, const void* value, Extent extent, Site site) {
  const size_t bytes = extent.size;
  machine->step(site);
  const size_t offset = shared_offset(to, extent, "shared_store");
  check_shared_write(offset, bytes, "shared_store");
  machine->self->block->shadow->set_initialised(offset, bytes);
  std::memcpy(to, value, bytes);
}

void read_peer(void* value, const void* from, int rank, Extent extent, Site site) {
  const size_t bytes = extent.size;
  Machine& m = *machine;
  m.step(site);
  const size_t offset = shared_offset(from, extent, "peer_load");
  if (rank < 0 || rank >= m.blocks()) {
    m.fail("cluster-rank", m.name_of(*m.self) + ": peer_load at " + site.text() + " from block " +
                               std::to_string(rank) + " of a cluster of " + std::to_string(m.blocks()));
  }
  Block& peer = m.block(rank);
  if (peer.returned == m.config.threads) {
    m.fail("peer-exit", m.name_of(*m.self) + ": peer_load at " + site.text() + " from block " +
                            std::to_string(peer.index) + ", which has returned");
  }
  if (&peer != m.self->block) peer.peer_epoch = m.actor().cluster_epoch, peer.peer_site = site;
  std::memcpy(value, check_shared_read(peer, offset, bytes, "peer_load"), bytes);
}

void read_global(void* value, const void* from, Extent extent, bool constant, Site site) {
  const size_t bytes = extent.size;
  Machine& m = *machine;
  m.step(site);
  const char* const word = bytes < 16 ? "load" : constant ? "load_vector" : "load_vector_coherent";
  Buffer& buffer = find_global(from, extent, word);
  const size_t offset = offset_in(buffer, from);
  check_global_read(buffer, offset, bytes, word);
  if (constant) {
    buffer.shadow.note_read_as_constant(offset, bytes);
    if (buffer.shadow.written(offset, bytes)) {
      m.note("stale-read", m.name_of(*m.self) + ": load_vector at " + site.text() + " of byte " +
                               std::to_string(offset) + " of '" + buffer.name + "', which this launch has written");
    }
  }
  buffer.counters.count(bytes, false);
  std::memcpy(value, from, bytes);
}

void write_global(void* to, const void* value, Extent extent, Site site) {
  const size_t bytes = extent.size;
  Machine& m = *machine;
  m.step(site);
  const char* const word = bytes < 16 ? "store" : "store_vector";
  Buffer& buffer = find_global(to, extent, word);
  const size_t offset = offset_in(buffer, to);
  const auto where = [&] {
    return m.name_of(*m.self) + ": " + word + " at " + site.text() + " to byte " + std::to_string(offset) + " of '" +
           buffer.name + "', which ";
  };
  if (!buffer.writable) m.fail("read-only", where() + "is not to be written");
  if (buffer.shadow.read_as_constant(offset, bytes)) {
    m.note("stale-read", where() + "a load_vector of this launch has read");
  }
  if (buffer.shadow.by_bulk(offset, bytes) && m.unheard_source(to, bytes)) {
    m.note("missing-wait",
           where() + "the copy issued at " + m.unheard_source(to, bytes)->site.text() + " may still be reading");
  }
  buffer.shadow.note_written(offset, bytes);
  note_global_race(buffer, buffer.shadow.record(offset, bytes, true, m.actor(), site), true);
  buffer.shadow.set_initialised(offset, bytes);
  buffer.counters.count(bytes, true);
  std::memcpy(to, value, bytes);
}

// Every word of a barrier but its making reads it, as far as other threads' stores are concerned.
size_t touch_barrier(const void* barrier, const char* word) {
  const size_t offset = shared_offset(barrier, {sizeof(uint64_t), sizeof(uint64_t)}, word);
  Block& block = *machine->self->block;
  const Conflict conflict =
      block.shadow->record(offset, sizeof(uint64_t), false, machine->actor(), machine->self->site);
  note_shared_race(block, conflict, false);
  return offset;
}

void init_phases(void* barrier, int arrivals, Site site) {
  Machine& m = *machine;
  m.step(site);
  const size_t offset = shared_offset(barrier, {sizeof(uint64_t), sizeof(uint64_t)}, "phases_init");
  Block& block = *m.self->block;
  m.init_phases(offset, arrivals);
  note_shared_race(block, block.shadow->record(offset, sizeof(uint64_t), true, m.actor(), site), true);
}

void arrive_at(void* barrier, int64_t bytes, Site site) {
  machine->step(site);
  machine->arrive_at(touch_barrier(barrier, "phases_arrive"), bytes);
}

void wait_for_phase(void* barrier, int parity, Site site) {
  machine->step(site);
  machine->wait_for_phase(touch_barrier(barrier, "phases_wait"), parity);
}

void fence_async(Site site) {
  machine->step(site);
  machine->fence_async();
}

void named_barrier(int id, int threads, bool waits, Site site) { machine->named_barrier(id, threads, waits, site); }

// The end of the phase at which it arrives is all that tells when it has read, and written.
void issue_bulk(void* shared, const void* global, int64_t bytes, void* barrier, Site site) {
  Machine& m = *machine;
  m.step(site);
  const char* const word = "copy_bulk";
  if (bytes < 16 || bytes % 16) {
    m.fail("misaligned", m.name_of(*m.self) + ": copy_bulk at " + site.text() + " of " + std::to_string(bytes) +
                             " bytes; allowed: multiples of 16");
  }
  const auto size = static_cast<size_t>(bytes);
  const size_t offset = shared_offset(shared, {size, 16}, word);
  Buffer& buffer = find_global(global, {size, 16}, word);
  const size_t source = offset_in(buffer, global);
  const size_t at = touch_barrier(barrier, word);
  check_global_read(buffer, source, size, word);
  Block& block = *m.self->block;
  check_not_under_way(block, offset, size, word);
  Access hidden;
  const auto fenced = [&](const Access& write) { return m.fenced({write.thread, write.epoch, write.clock}); };
  note_shared_race(block, block.shadow->claim(offset, size, m.actor(), fenced, &hidden), true);
  if (hidden.epoch) {
    Site written;
    written.set_bits(hidden.site);
    m.note("missing-fence", m.name_of(*m.self) + ": copy_bulk at " + site.text() + " to where " +
                                m.name_of(hidden.thread) + " wrote at " + written.text() +
                                " with no fence_async between");
  }
  block.shadow->set_under_way(offset, size, true);
  block.shadow->set_by_bulk(offset, size);
  buffer.shadow.set_by_bulk(source, size);
  buffer.counters.count_bulk(size);
  m.issue_bulk(offset, static_cast<const char*>(global), size, at);
}

// The copy may write at any time from now on, and reads its source some time before its wait.
void issue_copy(void* shared, const void* global, size_t bytes, Site site) {
  Machine& m = *machine;
  m.step(site);
  const size_t offset = shared_offset(shared, {bytes, bytes}, "copy_async");
  Buffer& buffer = find_global(global, {bytes, bytes}, "copy_async");
  check_global_read(buffer, offset_in(buffer, global), bytes, "copy_async");
  check_shared_write(offset, bytes, "copy_async");
  m.self->block->shadow->set_under_way(offset, bytes, true);
  buffer.counters.count(bytes, false);
  Copy copy = {offset, static_cast<const char*>(global), bytes, m.self->groups, m.random.one_in(2), {}, site};
  if (copy.sampled) std::memcpy(copy.value, global, bytes);
  m.self->copies.push_back(copy);
}

void commit_copies(Site site) {
  machine->step(site);
  ++machine->self->groups;
}

void wait_for_copies(int under_way, Site site) {
  Machine& m = *machine;
  m.step(site);
  Block& block = *m.self->block;
  std::vector<Copy>& copies = m.self->copies;
  size_t landed = 0;
  for (; landed < copies.size() && copies[landed].group < m.self->groups - under_way; ++landed) {
    Copy& copy = copies[landed];
    Buffer& buffer = *m.memory.find(copy.from, copy.bytes);
    check_global_read(buffer, offset_in(buffer, copy.from), copy.bytes, "copy_async");
    if (!copy.sampled) std::memcpy(copy.value, copy.from, copy.bytes);
    block.shadow->set_under_way(copy.to, copy.bytes, false);
    check_shared_write(copy.to, copy.bytes, "copy_async");
    block.shadow->set_initialised(copy.to, copy.bytes);
    std::memcpy(block.shared->data() + copy.to, copy.value, copy.bytes);
  }
  copies.erase(copies.begin(), copies.begin() + static_cast<ptrdiff_t>(landed));
}

}  // namespace simt
