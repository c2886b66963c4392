// The asynchronous copies and matrix products of sm_80, one instruction each.
#pragma once

#include <type_traits>

#include "kernels/cuda/device.h"

namespace gradnorm {

// 16 bytes from global to shared memory, or as many zeros where !inside (nothing is read then).
__device__ inline void copy_async(void* shared, const void* global, bool inside) {
#ifdef __CUDACC__
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = inside ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes)
               : "memory");
#else
  emulator::copy_async(shared, global, inside ? 16 : 0, 16);
#endif
}

__device__ inline void commit_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulator::commit_copies();
#endif
}

// Until no more than kPending of this thread's commits are under way.
template <int kPending>
__device__ inline void wait_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  emulator::wait_copies(kPending);
#endif
}

// Four 8 x 8 matrices, transposed: lane 8 i + r gives the address of row r of matrix i.
__device__ inline void load_matrices_transposed(unsigned (&matrices)[4], const void* row) {
#ifdef __CUDACC__
  const auto from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(from)
               : "memory");
#else
  const auto loaded = emulator::load_matrices_transposed(EMULATOR_PLACE, row);
  for (int i = 0; i < 4; ++i) matrices[i] = loaded[i];
#endif
}

// c += a b, [16, 8] += [16, 16] [16, 8], in the fragments of mma.m16n8k16.
template <typename T>
__device__ inline void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                    unsigned b1) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#else
  const emulator::Fragments given = {{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  const auto sums =
      emulator::multiply_add(EMULATOR_PLACE, given, [](uint16_t bits) { return widen(T{bits}); });
  for (int i = 0; i < 4; ++i) c[i] = sums[i];
#endif
}

}  // namespace gradnorm
