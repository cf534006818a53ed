// Threads. torch and these kernels share one OpenMP runtime, and the caller says how many threads
// torch may use: omp_get_max_threads() would not know it in a thread that Python started.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace bertfast {
namespace {

// Below this many elements a thread costs more to wake than it saves.
constexpr int64_t elements_per_thread = 16384;

// Calls body(begin, end) on consecutive shares of [0, items), on as many threads as are worth it.
template <class Body>
inline void parallel(int threads, int64_t items, int64_t elements, const Body& body) {
  const int64_t useful = elements / elements_per_thread;
  int64_t count = threads < useful ? threads : useful;
  count = count < items ? count : items;
#if defined(_OPENMP)
  if (count > 1) {
#pragma omp parallel num_threads(static_cast<int>(count))
    {
      const int64_t shares = omp_get_num_threads(), share = omp_get_thread_num();
      const int64_t begin = items * share / shares, end = items * (share + 1) / shares;
      if (begin < end) body(begin, end);
    }
    return;
  }
#endif
  if (items > 0) body(static_cast<int64_t>(0), items);
}

// Calls body(take) on up to `threads` threads; take() gives each task of [0, tasks) out once, and
// then numbers >= tasks. Whoever is done takes the next, so tasks may be of different sizes.
template <class Body>
inline void parallel_tasks(int threads, int64_t tasks, const Body& body) {
  int64_t next = 0;
  const auto take = [&next] { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); };
#if defined(_OPENMP)
  const int64_t count = threads < tasks ? threads : tasks;
  if (count > 1) {
#pragma omp parallel num_threads(static_cast<int>(count))
    body(take);
    return;
  }
#endif
  if (tasks > 0) body(take);
}

}  // namespace
}  // namespace bertfast
