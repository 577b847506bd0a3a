// Memory that lingers for the next call after it is freed, of fresh gradients and of the linear loss: what the system
// takes to map and zero as much again is about half of the time of a call on logits. Of each kind one block at most
// lingers, and the system may take its pages back at any moment.
#pragma once

#include <cstddef>

namespace fastkd {

// Kinds of memory: a small gradient beside a large one, or the logits of a model, does not push out what lingers of it.
enum class Lingers { small_gradient, large_gradient, student_logits, teacher_logits };
constexpr int kLingering = 4;

inline constexpr Lingers gradient_of(size_t bytes) {
  return bytes >= size_t{1} << 21 ? Lingers::large_gradient : Lingers::small_gradient;
}

// The C library's large blocks, logits among them, begin 64 bytes behind a page's border. A gradient at the same offset
// would share its columns' cache sets with theirs: 2 to 4 % of a call.
constexpr size_t kPastPage = 1024;

struct LingeringMemory {
  void* data;       // kPastPage bytes behind a page's border, that of a large gradient behind a huge page's
  size_t capacity;  // bytes mapped
  Lingers kind;
};

// FASTKD_LINGER_BYTES, or 1 GiB where it is not set: larger memory than this does not linger, 0 switches lingering off.
// Where it is no number, -1 and `error` says so. Read once.
long long linger_limit(const char** error);

// Memory of at least `bytes`, of any content; nullptr where the caller's own allocation does as well: small or larger
// than `limit`, systems other than Linux, address space exhausted.
LingeringMemory* take_memory(size_t bytes, long long limit, Lingers kind);

// Any thread, at any time, also after a fork.
void free_memory(LingeringMemory* memory);

// Gives what lingers back to the system. Returns its bytes.
size_t release_lingering_memory();

}  // namespace fastkd
