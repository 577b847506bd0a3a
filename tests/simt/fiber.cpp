#include "fiber.h"

#include <sys/mman.h>

#include <cstring>
#include <new>

namespace simt {

#if SIMT_OWN_SWITCH

// Registers that a call preserves in the System V ABI, and the two control words, which no kernel changes.
asm(R"(
.text
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
extern "C" void simt_switch(void** save, void* stack) __attribute__((visibility("hidden")));

void prepare(Context& context, char* top, void (*entry)()) {
  // A function starts with its stack 8 bytes past a multiple of 16; the six registers start as 0.
  void** stack = reinterpret_cast<void**>(top - 16);
  *stack = reinterpret_cast<void*>(entry);
  std::memset(stack - 6, 0, 6 * sizeof(void*));
  context.stack = stack - 6;
}

void switch_context(Context& from, Context& to) { simt_switch(&from.stack, to.stack); }

#else

void prepare(Context& context, char* top, void (*entry)()) {
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = top - kStackBytes / 2;
  context.registers.uc_stack.ss_size = kStackBytes / 2;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
}

void switch_context(Context& from, Context& to) { swapcontext(&from.registers, &to.registers); }

#endif

StackPool::~StackPool() {
  for (char* slab : slabs_) munmap(slab, kSlab * kStride);
}

char* StackPool::top(size_t i) {
  while (slabs_.size() * kSlab <= i) {
    void* slab =
        mmap(nullptr, kSlab * kStride, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (slab == MAP_FAILED) throw std::bad_alloc();
    for (size_t s = 0; s < kSlab; ++s) mprotect(static_cast<char*>(slab) + s * kStride, kPage, PROT_NONE);
    slabs_.push_back(static_cast<char*>(slab));
  }
  // Tops at different places of a page: else the live frames of all fibers share a few lines of the cache.
  return slabs_[i / kSlab] + (i % kSlab + 1) * kStride - i % 31 * 128;
}

int64_t StackPool::guard_of(const void* address) const {
  for (size_t k = 0; k < slabs_.size(); ++k) {
    const ptrdiff_t offset = static_cast<const char*>(address) - slabs_[k];
    if (offset >= 0 && offset < static_cast<ptrdiff_t>(kSlab * kStride)) {
      return offset % kStride < kPage ? static_cast<int64_t>(k * kSlab + offset / kStride) : -1;
    }
  }
  return -1;
}

}  // namespace simt
