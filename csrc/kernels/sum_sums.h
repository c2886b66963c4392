// Per-segment gradient of a bias.
#pragma once

#include "kernels/host.h"

namespace gradnorm {

// out[s] = sum_{r in s} g[r]
//
//   g  [rows, width], inner stride 1; offsets  [segments + 1]; out  [segments, width] contiguous
template <typename T>
void sum_sums_cpu(const T* g, int64_t g_stride, int64_t width, const int64_t* offsets,
                  int64_t segments, T* out, const Host<T>& host);

}  // namespace gradnorm
