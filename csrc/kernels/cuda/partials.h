// Sums of the parts of norms, in a fixed order: the second pass of what many blocks contribute to.
#pragma once

#include "kernels/cuda/device.h"

namespace gradnorm {

// A warp an entry.
template <typename T>
__global__ void __launch_bounds__(256)
    sum_partials_kernel(const T* parts, int64_t entries, int64_t of_entry, T* out) {
  const int64_t entry = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (entry >= entries) return;
  double total = 0;
  for (int64_t i = threadIdx.x; i < of_entry; i += kWarp) {
    total += double(parts[entry * of_entry + i]);
  }
  total = sum_warp(total);
  if (threadIdx.x == 0) out[entry] = T(total);
}

// out[e] = sum of parts[e][0 .. of_entry)
template <typename T>
void sum_partials(const char* operation, const T* parts, int64_t entries, int64_t of_entry, T* out,
                  void* stream) {
  launch(operation, &sum_partials_kernel<T>, (entries + 7) / 8, dim3(kWarp, 8), 0, stream, parts,
         entries, of_entry, out);
}

}  // namespace gradnorm
