// See lingering_memory.h. Atomic pointers are all the state: no lock that a fork could leave taken, nothing to destroy
// before the last tensor.
#include "lingering_memory.h"

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastkd {
namespace {

constexpr size_t kHugePage = size_t{1} << 21, kPage = 4096;
constexpr long long kDefaultLimit = 1LL << 30;
constexpr size_t kSmallest = size_t{1} << 17;  // below, the C library keeps freed memory itself

std::atomic<LingeringMemory*> lingering[kLingering];
std::atomic<LingeringMemory*>& lingering_of(Lingers kind) { return lingering[static_cast<int>(kind)]; }

struct Limit {
  long long bytes = kDefaultLimit;
  std::string error;

  Limit() {
    const char* text = std::getenv("FASTKD_LINGER_BYTES");
    if (!text || !*text) return;
    char* end = nullptr;
    errno = 0;
    bytes = std::strtoll(text, &end, 10);
    if (errno == 0 && *end == '\0' && bytes >= 0) return;
    bytes = -1;
    error = "FASTKD_LINGER_BYTES=" + std::string(text) + " is not a number of bytes >= 0";
  }
};

#if defined(__linux__)

void* mapping_of(const LingeringMemory* memory) { return static_cast<char*>(memory->data) - kPastPage; }

void unmap(LingeringMemory* memory) {
  munmap(mapping_of(memory), memory->capacity);
  delete memory;
}

// Maps whole pages, a large gradient from a huge page's border on, and advises huge pages for those that are filled.
void* map_aligned(size_t capacity, bool huge) {
  const size_t border = huge ? kHugePage : kPage, mapped = capacity + border - kPage;
  void* memory = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t aligned = (begin + border - 1) / border * border;
  if (aligned > begin) munmap(memory, aligned - begin);
  const uintptr_t end = aligned + capacity;
  if (begin + mapped > end) munmap(reinterpret_cast<void*>(end), begin + mapped - end);
  void* data = reinterpret_cast<void*>(aligned);
  if (huge) madvise(data, capacity / kHugePage * kHugePage, MADV_HUGEPAGE);  // a hint: may fail
  return data;
}

#endif

}  // namespace

long long linger_limit(const char** error) {
  static const Limit limit;
  *error = limit.error.c_str();
  return limit.bytes;
}

#if defined(__linux__) && defined(MADV_FREE)

LingeringMemory* take_memory(size_t bytes, long long limit, Lingers kind) {
  if (bytes < kSmallest || limit < 0 || bytes > static_cast<size_t>(limit)) return nullptr;
  const size_t needed = bytes + kPastPage, capacity = (needed + kPage - 1) / kPage * kPage;
  if (LingeringMemory* kept = lingering_of(kind).exchange(nullptr)) {
    // much larger memory would hold on to pages that nobody uses
    if (kept->capacity >= needed && kept->capacity / 2 <= needed) return kept;
    unmap(kept);
  }
  void* mapping = map_aligned(capacity, kind == Lingers::large_gradient);
  if (!mapping) return nullptr;
  void* data = static_cast<char*>(mapping) + kPastPage;
  auto* memory = new (std::nothrow) LingeringMemory{data, capacity, kind};
  if (!memory) munmap(mapping, capacity);
  return memory;
}

void free_memory(LingeringMemory* memory) {
  // from here on the system may take the pages, but need not: written again before that, they cost nothing
  if (madvise(mapping_of(memory), memory->capacity, MADV_FREE) != 0) return unmap(memory);
  if (LingeringMemory* other = lingering_of(memory->kind).exchange(memory)) unmap(other);
}

size_t release_lingering_memory() {
  size_t bytes = 0;
  for (auto& slot : lingering) {
    if (LingeringMemory* kept = slot.exchange(nullptr)) {
      bytes += kept->capacity;
      unmap(kept);
    }
  }
  return bytes;
}

#else

LingeringMemory* take_memory(size_t, long long, Lingers) { return nullptr; }
void free_memory(LingeringMemory*) {}
size_t release_lingering_memory() { return 0; }

#endif

}  // namespace fastkd
