// Squared norms of segments' summed outer products by the gram method.
#pragma once

#include "kernels/host.h"

namespace gradnorm {

// sqnorm[s] = sum_{q, r in s} (x[q] . x[r]) (g[q] . g[r])
//
//   x  [rows, p], g  [rows, d], inner stride 1; offsets  [segments + 1]; sqnorm  [segments]
template <typename T>
void outer_sqnorm_cpu(const T* x, int64_t x_stride, const T* g, int64_t g_stride, int64_t p,
                      int64_t d, const int64_t* offsets, int64_t segments, T* sqnorm,
                      const Host<T>& host);

}  // namespace gradnorm
