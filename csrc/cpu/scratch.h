// Working memory. A thread keeps it for its next call, because memory fresh from the system costs a
// page fault every 4 KB, which is more than the work of a short sequence.
#pragma once

#include <cstdint>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace bertfast {
namespace {

class Scratch {
 public:
  // Beyond this many bytes the memory is given back after the call.
  static constexpr size_t kept = size_t{8} << 20;
  static constexpr size_t alignment = 64;

  Scratch() = default;
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // Starts anew with room for `bytes` in all; false when there is none to be had.
  bool reset(size_t bytes) {
    used_ = 0;
    if (bytes <= size_) return true;
    std::free(data_);
    size_ = (bytes + 4095) / 4096 * 4096;
    data_ = static_cast<char*>(std::aligned_alloc(alignment, size_));
    if (!data_) size_ = 0;
    return data_ != nullptr;
  }

  // The next `count` elements of the room.
  template <class T>
  T* take(int64_t count) {
    char* p = data_ + used_;
    used_ += bytes_for<T>(count);
    return reinterpret_cast<T*>(p);
  }

  template <class T>
  static size_t bytes_for(int64_t count) {
    const size_t bytes = sizeof(T) * static_cast<size_t>(count);
    return (bytes + alignment - 1) / alignment * alignment;
  }

  void finish() {
    if (size_ <= kept) return;
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  char* data_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

// glibc maps a block this large anew every time, and fresh pages of 4 KB take five times as long to
// fill as those of 2 MB, which Linux often has for the asking.
inline void ask_for_large_pages(void* p, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t always_fresh = 32 << 20;
  if (bytes < always_fresh) return;
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + page - 1) / page * page;
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(bytes)) / page * page;
  // Refused, the pages are the usual ones.
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)p, (void)bytes;
#endif
}

inline Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

}  // namespace
}  // namespace bertfast
