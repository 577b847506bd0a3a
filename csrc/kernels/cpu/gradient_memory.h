// Memory of fresh gradients, which lingers for the next call after it is freed: what the system takes to map and zero
// as much again is about half of the time of a call. One small gradient's memory and one large one's at most linger,
// and the system may take their pages back at any moment.
#pragma once

#include <cstddef>

namespace fastkd {

struct GradientMemory {
  void* data;         // aligned to pages, from a huge page on to huge pages
  size_t capacity;    // bytes
  size_t max_linger;  // bytes that may linger when this is freed
};

// FASTKD_LINGER_BYTES, or 1 GiB where it is not set: larger memory than this does not linger, 0 switches lingering off.
// Where it is no number, -1 and `error` says so. Read once.
long long linger_limit(const char** error);

// Memory of at least `bytes`, of any content; nullptr where the caller's own allocation does as well: small or larger
// than `limit`, systems other than Linux, address space exhausted.
GradientMemory* take_gradient_memory(size_t bytes, long long limit);

// Any thread, at any time, also after a fork.
void free_gradient_memory(GradientMemory* memory);

// Gives what lingers back to the system. Returns its bytes.
size_t release_lingering_memory();

}  // namespace fastkd
