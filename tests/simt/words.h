// What the port's twin says to the machine on behalf of the running thread.
#pragma once

#include <cstddef>
#include <cstdint>

#include "site.h"

namespace simt {

int thread_index();
int block_threads();
int64_t block_index();
int64_t grid_blocks();
int cluster_rank();
int cluster_blocks();

void block_barrier(Site site);
void cluster_barrier(Site site);

// Collectives of a warp: they return when all lanes of `mask` have called.
enum class Meeting { sync, ballot, shuffle, shuffle_xor };
uint64_t meet(Meeting kind, unsigned mask, uint64_t value, int lane, Site site);

// Of memory: `size` bytes, at an address that `align` divides.
struct Extent {
  size_t size, align;
};
char* shared_memory();
void read_shared(void* value, const void* from, Extent extent, Site site);
void write_shared(void* to, const void* value, Extent extent, Site site);
void read_peer(void* value, const void* from, int rank, Extent extent, Site site);

// `constant`: by a load that supposes that the launch nowhere writes these bytes.
void read_global(void* value, const void* from, Extent extent, bool constant, Site site);
void write_global(void* to, const void* value, Extent extent, Site site);

void issue_copy(void* shared, const void* global, size_t bytes, Site site);  // bytes: 8 or 16
void commit_copies(Site site);
void wait_for_copies(int under_way, Site site);

// Barriers in shared memory, of 8 bytes. `bytes`: what copies will bring in this phase, beside the arrival.
void init_phases(void* barrier, int arrivals, Site site);
void arrive_at(void* barrier, int64_t bytes, Site site);
void wait_for_phase(void* barrier, int parity, Site site);
// By the asynchronous proxy: `bytes` is a multiple of 16.
void issue_bulk(void* shared, const void* global, int64_t bytes, void* barrier, Site site);
void fence_async(Site site);

// Barrier `id` of the block, for so many of its threads.
void named_barrier(int id, int threads, bool waits, Site site);

}  // namespace simt
