// CUDA's execution model on the CPU, for tests: the .cu sources compiled by a C++ compiler.
//
// Every thread of a block is a fiber, blocks run one after another. A fiber runs until it has to
// wait for others, at a barrier or a shuffle. Warps and their threads run in the order of their
// numbers or in reverse, a warp as far as it gets before the next one starts; or all take turns in a
// random order. Blocks come in the same orders. On a GPU all of these are possible, so results that
// depend on it are a race. Shared memory is filled with a pattern before each block,
// and lies between redzones: results that depend on the pattern read what nobody wrote, and a
// redzone that has changed was written beyond an end. What a kernel does wrong ends the launch with
// a message (Emulator::error). With -fsanitize=address,undefined, accesses to global memory out of
// bounds or misaligned end the process.
//
// Not modelled: warps in lockstep (a fiber runs on where a GPU's thread may not), memory ordering
// between blocks, occupancy, time.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
constexpr cudaError_t cudaErrorInvalidConfiguration = 9;
constexpr cudaError_t cudaErrorLaunchFailure = 719;

namespace bertfast::emulation {

enum class Order { forward, reverse, random };

constexpr int warp_size = 32;

class Emulator {
 public:
  static Emulator& the() {
    static Emulator emulator;
    return emulator;
  }

  Order order = Order::forward;
  uint32_t seed = 0;
  // Shared memory's bytes before a block: 0xFF makes NaN of every floating-point type.
  uint8_t pattern = 0xFF;
  // What the last launch did wrong; "" if nothing.
  std::string error;

  // Runs the body once for each thread of each block.
  cudaError_t run(dim3 grid, dim3 block, size_t dynamic_bytes, const char* name,
                  const std::function<void()>& body) {
    error.clear();
    name_ = name;
    const uint64_t threads = uint64_t{block.x} * block.y * block.z;
    const bool fits = grid.x - 1u < 0x7FFFFFFFu && grid.y - 1u < 65535u && grid.z - 1u < 65535u;
    if (!fits || threads - 1 >= 1024u || block.z > 64u || dynamic_bytes > most_shared) {
      error = name_ + ": no such grid or block";
      return cudaErrorInvalidConfiguration;
    }
    grid_ = grid, block_ = block, body_ = &body;
    random_.seed(seed);
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
    std::vector<uint64_t> turns(blocks);
    for (uint64_t i = 0; i < blocks; ++i) turns[i] = order == Order::reverse ? blocks - 1 - i : i;
    if (order == Order::random) std::shuffle(turns.begin(), turns.end(), random_);
    for (uint64_t i : turns) {
      if (!error.empty()) break;
      run_block(
          dim3(unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)),
          int(threads), dynamic_bytes);
    }
    body_ = nullptr;
    return error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
  }

  dim3 thread() const { return fibers_[current_].index; }
  dim3 block_index() const { return block_index_; }
  dim3 block_size() const { return block_; }
  dim3 grid_size() const { return grid_; }

  // All threads of the block wait here for each other.
  void barrier(const char* where) { wait(Wait::barrier, where, 0); }

  // What a thread shows the others of its warp.
  struct Brought {
    uint32_t word[6];
  };

  // The threads of a warp named in `mask` wait for each other, and see what each brought, by lane,
  // until they wait again.
  const Brought* exchange(uint32_t mask, const Brought& brought, const char* where) {
    Fiber& self = fibers_[current_];
    if (!(mask >> (current_ % warp_size) & 1u)) fail("a thread is not in its own mask", where);
    self.brought = brought;
    wait(Wait::warp, where, mask);
    return self.seen;
  }

  void check_aligned(const void* p, const char* where) {
    if (reinterpret_cast<uintptr_t>(p) % 16) fail("an address is not on 16 bytes", where);
  }

  static Brought halves(uint64_t value) {
    return {{static_cast<uint32_t>(value), static_cast<uint32_t>(value >> 32)}};
  }

  static uint64_t whole(const Brought& brought) {
    return brought.word[0] | uint64_t{brought.word[1]} << 32;
  }

  // 16 bytes, or zeros without a source. Copied only when it is waited for.
  void copy_async(void* to, const void* from, const char* where) {
    check_aligned(to, where);
    check_aligned(from, where);
    fibers_[current_].copies.back().push_back({to, from});
  }

  void commit_copies() { fibers_[current_].copies.emplace_back(); }

  // All groups that were committed, but for the last `later`.
  void wait_for_copies(size_t later) {
    auto& groups = fibers_[current_].copies;
    while (groups.size() > later + 1) {
      for (const Copy& copy : groups.front())
        copy.from ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
      groups.erase(groups.begin());
    }
  }

  void load_matrices(uint32_t (&to)[4], const void* row, bool transposed, const char* where) {
    check_aligned(row, where);
    const uint64_t address = reinterpret_cast<uintptr_t>(row);
    const Brought* rows = exchange(all_lanes, halves(address), where);
    const int lane = current_ % warp_size;
    for (int i = 0; i < 4; ++i) {
      uint16_t pair[2];
      for (int j = 0; j < 2; ++j) {
        const int r = transposed ? 2 * (lane % 4) + j : lane / 4;
        const int c = transposed ? lane / 4 : 2 * (lane % 4) + j;
        pair[j] = reinterpret_cast<const uint16_t*>(whole(rows[8 * i + r]))[c];
      }
      to[i] = uint32_t{pair[0]} | uint32_t{pair[1]} << 16;
    }
  }

  // Memory of the block: the same for all of its threads that ask under the same name.
  void* shared(const void* key, size_t bytes) {
    for (const Area& area : areas_)
      if (area.key == key) return area.begin;
    return allocate(key, bytes);
  }

  void* dynamic_shared() { return shared(&dynamic_key_, 0); }

  // Ends the launch. Does not return to the kernel.
  [[noreturn]] void fail(const std::string& what, const char* where) {
    if (error.empty()) {
      const dim3 t = thread(), b = block_index_;
      error = name_ + ": " + what + " at " + where + ", thread (" + std::to_string(t.x) + ", " +
              std::to_string(t.y) + ", " + std::to_string(t.z) + ") of block (" +
              std::to_string(b.x) + ", " + std::to_string(b.y) + ", " + std::to_string(b.z) + ")";
    }
    fibers_[current_].wait = Wait::ended;
    leave();
    std::abort();  // an ended fiber is never resumed
  }

 private:
  static constexpr size_t most_shared = 227 * 1024;
  static constexpr size_t redzone = 128;  // the largest alignment anything asks for, too
  static constexpr size_t stack_bytes = 256 * 1024;

  static constexpr uint32_t all_lanes = 0xFFFFFFFFu;

  enum class Wait { nothing, barrier, warp, ended };

  struct Copy {
    void* to;
    const void* from;
  };

  struct Fiber {
    ucontext_t context{};
    std::unique_ptr<char[]> stack;
    dim3 index;
    Wait wait = Wait::nothing;
    const char* where = "";
    uint32_t mask = 0;
    Brought brought{};
    Brought together[warp_size];  // of the threads that waited together, with the first of them
    const Brought* seen = nullptr;
    std::vector<std::vector<Copy>> copies;  // groups; the last one is not committed
    void* fake_stack = nullptr;
  };

  struct Area {
    const void* key;
    char* begin;
    size_t bytes;
  };

  void run_block(dim3 index, int threads, size_t dynamic_bytes) {
    block_index_ = index;
    areas_.clear();
    arena_.resize(most_shared + 64 * redzone);
    used_ = 0;
    allocate(&dynamic_key_, dynamic_bytes);
    if (int(fibers_.size()) < threads) fibers_.resize(threads);
    for (int i = 0; i < threads; ++i) start(i);
    std::vector<int> turns(threads);
    for (int i = 0; i < threads; ++i) turns[i] = order == Order::reverse ? threads - 1 - i : i;
    for (int ended = 0; ended < threads && error.empty();) {
      if (order == Order::random) std::shuffle(turns.begin(), turns.end(), random_);
      bool went_on = false;
      // All at once take turns, or else a warp goes on for as long as it can.
      const int together = order == Order::random ? threads : warp_size;
      for (int first = 0; first < threads; first += together) {
        for (bool again = true; again && error.empty();) {
          again = false;
          for (int t = first; t < std::min(first + together, threads); ++t) {
            const int i = turns[t];
            if (fibers_[i].wait != Wait::nothing || !error.empty()) continue;
            resume(i);
            went_on = again = true;
            ended += fibers_[i].wait == Wait::ended;
            release_warp(i, threads);
          }
          again = again && order != Order::random;
        }
      }
      if (error.empty() && !release_block(threads) && !went_on && ended < threads) stuck(threads);
    }
    for (const Area& area : areas_) set_redzones(area, false);
    for (const Area& area : areas_)
      for (size_t i = 0; i < redzone && error.empty(); ++i)
        if (uint8_t(area.begin[-1 - int64_t(i)]) != pattern ||
            uint8_t(area.begin[area.bytes + i]) != pattern)
          error = name_ + ": shared memory was written beyond an end of its " +
                  std::to_string(area.bytes) + " bytes";
  }

  void* allocate(const void* key, size_t bytes) {
    const size_t begin = used_ + redzone, end = begin + bytes + redzone;
    if (end + 2 * redzone > arena_.size())
      fail("more shared memory than a block has", "its declaration");
    char* base = arena_.data() + (redzone - reinterpret_cast<uintptr_t>(arena_.data()) % redzone);
    std::memset(base + used_, pattern, end - used_);
    areas_.push_back({key, base + begin, bytes});
    set_redzones(areas_.back(), true);
    used_ = (end + redzone - 1) / redzone * redzone;
    return base + begin;
  }

  // Whether the address sanitizer ends the process at an access to them.
  void set_redzones(const Area& area, bool forbidden) {
#if defined(__SANITIZE_ADDRESS__)
    for (char* zone : {area.begin - redzone, area.begin + area.bytes})
      forbidden ? __asan_poison_memory_region(zone, redzone)
                : __asan_unpoison_memory_region(zone, redzone);
#else
    (void)area, (void)forbidden;
#endif
  }

  void start(int i) {
    Fiber& fiber = fibers_[i];
    const unsigned n = unsigned(i);
    fiber.index = dim3(n % block_.x, n / block_.x % block_.y, n / block_.x / block_.y);
    fiber.wait = Wait::nothing;
    fiber.copies.assign(1, {});
    // A launch that failed may have left its own traces.
    fiber.fake_stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
    if (fiber.stack) __asan_unpoison_memory_region(fiber.stack.get(), stack_bytes);
#endif
    if (!fiber.stack) fiber.stack.reset(new char[stack_bytes]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = stack_bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Emulator::enter, 0);
  }

  static void enter() {
    Emulator& self = the();
    self.arrived(nullptr);
    (*self.body_)();
    self.fibers_[self.current_].wait = Wait::ended;
    self.leave();
  }

  void wait(Wait what, const char* where, uint32_t mask) {
    Fiber& self = fibers_[current_];
    self.wait = what, self.where = where, self.mask = mask;
    leave();
  }

  void resume(int i) {
    current_ = i;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&main_fake_, fibers_[i].stack.get(), stack_bytes);
#endif
    swapcontext(&main_, &fibers_[i].context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(main_fake_, nullptr, nullptr);
#endif
  }

  void leave() {
    Fiber& self = fibers_[current_];
#if defined(__SANITIZE_ADDRESS__)
    // An ended fiber's own bookkeeping is given up.
    __sanitizer_start_switch_fiber(self.wait == Wait::ended ? nullptr : &self.fake_stack,
                                   main_stack_, main_stack_bytes_);
#endif
    swapcontext(&self.context, &main_);
    arrived(self.fake_stack);
  }

  void arrived(void* fake) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, &main_stack_, &main_stack_bytes_);
#else
    (void)fake;
#endif
  }

  // Lets the threads go on that thread i waits for in its warp, if all are there, at one place.
  void release_warp(int i, int threads) {
    if (fibers_[i].wait != Wait::warp) return;
    const int first = i / warp_size * warp_size;
    const uint32_t mask = fibers_[i].mask;
    for (int lane = 0; lane < warp_size; ++lane) {
      if (!(mask >> lane & 1u)) continue;
      if (first + lane >= threads) return;
      const Fiber& other = fibers_[first + lane];
      if (other.wait != Wait::warp || other.mask != mask || other.where != fibers_[i].where) return;
    }
    Brought* together = nullptr;
    for (int lane = 0; lane < warp_size; ++lane) {
      if (!(mask >> lane & 1u)) continue;
      Fiber& other = fibers_[first + lane];
      if (!together) together = other.together;
      together[lane] = other.brought;
      other.wait = Wait::nothing;
      other.seen = together;
    }
  }

  bool release_block(int threads) {
    for (int i = 0; i < threads; ++i)
      if (fibers_[i].wait != Wait::barrier || fibers_[i].where != fibers_[0].where) return false;
    for (int i = 0; i < threads; ++i) fibers_[i].wait = Wait::nothing;
    return true;
  }

  // Some threads wait for others that will not come.
  void stuck(int threads) {
    for (int i = 0; i < threads; ++i) {
      if (fibers_[i].wait == Wait::nothing || fibers_[i].wait == Wait::ended) continue;
      const bool at_barrier = fibers_[i].wait == Wait::barrier;
      for (int j = 0; j < threads; ++j) {
        const bool same =
            fibers_[j].wait == fibers_[i].wait && fibers_[j].where == fibers_[i].where;
        const bool awaited = at_barrier || (i / warp_size == j / warp_size &&
                                            (fibers_[i].mask >> (j % warp_size) & 1u));
        if (same || !awaited) continue;
        error = name_ + ": thread " + std::to_string(i) + " waits at " + fibers_[i].where +
                (at_barrier ? " (barrier)" : " (warp)") + ", thread " + std::to_string(j) +
                (fibers_[j].wait == Wait::ended ? " has ended"
                                                : std::string(" waits at ") + fibers_[j].where);
        return;
      }
      if (!at_barrier) {
        error = name_ + ": thread " + std::to_string(i) + " waits at " + fibers_[i].where +
                " for threads that are not in the block, or whose mask is another";
        return;
      }
    }
    error = name_ + ": threads wait for each other";
  }

  dim3 grid_, block_, block_index_;
  const std::function<void()>* body_ = nullptr;
  std::string name_;
  std::vector<Fiber> fibers_;
  std::vector<Area> areas_;
  std::vector<char> arena_;
  size_t used_ = 0;
  int current_ = 0;
  char dynamic_key_ = 0;
  ucontext_t main_{};
  void* main_fake_ = nullptr;
  const void* main_stack_ = nullptr;
  size_t main_stack_bytes_ = 0;
  std::mt19937 random_;
};

// What a member of a thread's index reads like in CUDA.
struct Index {
  dim3 (Emulator::*get)() const;
  struct Member {
    dim3 (Emulator::*get)() const;
    unsigned dim3::* part;
    operator unsigned() const { return (Emulator::the().*get)().*part; }
  };
  Member x{get, &dim3::x}, y{get, &dim3::y}, z{get, &dim3::z};
  explicit Index(dim3 (Emulator::*g)() const) : get(g) {}
};

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// From a table: without instructions for it, each conversion is a call that takes longer than the
// product it is for.
inline float half_to_float(uint16_t bits) {
  static const std::vector<float> table = [] {
    std::vector<float> values(1 << 16);
    for (size_t i = 0; i < values.size(); ++i)
      values[i] = static_cast<float>(from_bits<_Float16>(i));
    return values;
  }();
  return table[bits];
}

template <class T>
T shuffle(uint32_t mask, T value, int lane, const char* where) {
  const auto* all = Emulator::the().exchange(mask, Emulator::halves(to_bits(value)), where);
  if (lane < 0 || lane >= warp_size || !(mask >> lane & 1u))
    Emulator::the().fail("a shuffle reads a thread that is not in the mask", where);
  return from_bits<T>(Emulator::whole(all[lane]));
}

// The lanes of the mask for which it is true.
inline uint32_t ballot(uint32_t mask, bool value, const char* where) {
  const auto* all = Emulator::the().exchange(mask, {{value}}, where);
  uint32_t voted = 0;
  for (int lane = 0; lane < warp_size; ++lane)
    if (mask >> lane & 1u) voted |= all[lane].word[0] << lane;
  return voted;
}

inline int own_lane() {
  const dim3 t = Emulator::the().thread(), size = Emulator::the().block_size();
  return int((t.x + size.x * (t.y + size.y * t.z)) % warp_size);
}

}  // namespace bertfast::emulation

inline const bertfast::emulation::Index threadIdx{&bertfast::emulation::Emulator::thread};
inline const bertfast::emulation::Index blockIdx{&bertfast::emulation::Emulator::block_index};
inline const bertfast::emulation::Index blockDim{&bertfast::emulation::Emulator::block_size};
inline const bertfast::emulation::Index gridDim{&bertfast::emulation::Emulator::grid_size};

#define BERTFAST_TEXT_(x) #x
#define BERTFAST_TEXT(x) BERTFAST_TEXT_(x)
#define BERTFAST_WHERE __FILE__ ":" BERTFAST_TEXT(__LINE__)

#define __syncthreads() bertfast::emulation::Emulator::the().barrier(BERTFAST_WHERE)
#define __syncwarp() bertfast::emulation::Emulator::the().exchange(0xFFFFFFFFu, {}, BERTFAST_WHERE)
#define __shfl_sync(mask, value, lane) \
  bertfast::emulation::shuffle(mask, value, lane, BERTFAST_WHERE)
#define __shfl_xor_sync(mask, value, lanes)                                            \
  bertfast::emulation::shuffle(mask, value, bertfast::emulation::own_lane() ^ (lanes), \
                               BERTFAST_WHERE)

#define __ballot_sync(mask, value) bertfast::emulation::ballot(mask, value, BERTFAST_WHERE)
#define __any_sync(mask, value) (__ballot_sync(mask, value) != 0)
#define __all_sync(mask, value) (__ballot_sync(mask, value) == (mask))

inline int __clz(uint32_t bits) { return bits ? __builtin_clz(bits) : 32; }

// Blocks and threads run one at a time, so that a plain read and write is atomic.
template <class T>
T atomicAdd(T* p, T value) {
  const T before = *p;
  *p = before + value;
  return before;
}

template <class T>
T atomicMax(T* p, T value) {
  const T before = *p;
  *p = before < value ? value : before;
  return before;
}

template <class T>
T atomicCAS(T* p, T expected, T value) {
  const T before = *p;
  if (before == expected) *p = value;
  return before;
}
