// What tensor cores need, on sm_80 and newer: copies from global to shared memory that go on beside
// the program, matrices of shared memory in a warp's registers, and products of them. Registers hold
// what PTX says they hold, here as in the emulation, so that a wrong layout fails in both.
#pragma once

#include <type_traits>

#include "common.h"

namespace bertfast {
namespace {

// Copies 16 bytes, or zeros where the source is not `there`; both on 16 bytes. The copy may happen
// any time before the wait for its group, and in the emulation happens then.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool there = true) {
#if defined(BERTFAST_EMULATION)
  emulation::Emulator::the().copy_async(shared, there ? global : nullptr, "cp.async");
#else
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global),
               "r"(there ? 16 : 0)
               : "memory");
#endif
}

// Ends a group of copies.
__device__ __forceinline__ void commit_copies() {
#if defined(BERTFAST_EMULATION)
  emulation::Emulator::the().commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for this thread's groups but the last LATER ones. Other threads' need a barrier after it.
template <int LATER>
__device__ __forceinline__ void wait_for_copies() {
#if defined(BERTFAST_EMULATION)
  emulation::Emulator::the().wait_for_copies(LATER);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory");
#endif
}

// Four matrices of 8 x 8 16-bit elements (ldmatrix.x4). Lane l gives the address of row l % 8 of
// matrix l / 8, on 16 bytes, and gets of each matrix elements 2 (l % 4) and the next of row l / 4;
// TRANSPOSED, rows 2 (l % 4) and the next of column l / 4.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
#if defined(BERTFAST_EMULATION)
  emulation::Emulator::the().load_matrices(to, row, TRANSPOSED, "ldmatrix");
#else
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
#endif
}

// sums (16 x 8) += a (16 x 16) b (16 x 8), T is Bfloat16 or Half (mma.m16n8k16, row.col). With
// g = lane / 4 and t = lane % 4, a holds columns 2t and 2t + 1 of rows g and g + 8, then 8 columns
// further; b0 rows 2t and 2t + 1 of column g of b, b1 those 8 rows further; sums columns 2t and
// 2t + 1 of row g, then of row g + 8.
template <class T>
__device__ __forceinline__ void multiply(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
#if defined(BERTFAST_EMULATION)
  const auto* all =
      emulation::Emulator::the().exchange(0xFFFFFFFFu, {{a[0], a[1], a[2], a[3], b0, b1}}, "mma");
  const int g = emulation::own_lane() / 4, t = emulation::own_lane() % 4;
  const auto half = [](uint32_t word, int high) {
    return to_float(T{static_cast<uint16_t>(high ? word >> 16 : word)});
  };
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
    for (int k = 0; k < 16; ++k) {
      const uint32_t left = all[row % 8 * 4 + k % 8 / 2].word[row / 8 + 2 * (k / 8)];
      const uint32_t right = all[column * 4 + k % 8 / 2].word[4 + k / 8];
      sums[i] += half(left, k % 2) * half(right, k % 2);
    }
  }
#else
  if (std::is_same<T, Bfloat16>::value)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

}  // namespace
}  // namespace bertfast
