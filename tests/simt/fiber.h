// Fibers: stacks with guard pages, and the switch from one to another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#if !defined(__x86_64__) || defined(SIMT_UCONTEXT)
#define SIMT_OWN_SWITCH 0
#include <ucontext.h>
#else
#define SIMT_OWN_SWITCH 1
#endif

namespace simt {

// What a fiber resumes from.
struct Context {
#if SIMT_OWN_SWITCH
  void* stack = nullptr;  // its registers lie on top
#else
  ucontext_t registers;
#endif
};

constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kPage = 4 << 10;

// Makes `context` start in `entry` (which never returns) on the stack that ends at `top`.
void prepare(Context& context, char* top, void (*entry)());

// Saves the running fiber in `from` and resumes `to`.
void switch_context(Context& from, Context& to);

// Stacks, each behind a guard page; made once and kept, since most of their cost is the first touch.
class StackPool {
 public:
  ~StackPool();
  // The upper end of stack `i`.
  char* top(size_t i);
  // Which stack's guard page holds `address`; -1: none.
  int64_t guard_of(const void* address) const;

 private:
  static constexpr size_t kStride = kStackBytes + kPage;
  static constexpr size_t kSlab = 256;  // stacks a mapping
  std::vector<char*> slabs_;
};

}  // namespace simt
