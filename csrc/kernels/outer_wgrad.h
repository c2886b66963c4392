// The weight gradient of a linear layer and its norms per segment and group, by the direct method.
#pragma once

#include "kernels/host.h"
#include "kernels/segments.h"

namespace gradnorm {

// With G[s] = sum_{r in s} g[r] x[r]^T:
//
//   dw[o]          = sum_{s: outputs[s] = o} weight[s] G[s]
//   sqnorm[s]      = |G[s]|^2                      (only if segment_norms)
//   sqnorm[column] = |sum_{s in group} G[s]|^2     for every group of every level, unweighted
//
//   x  [rows, p], g  [rows, d], inner stride 1
//   weight  [segments] or null (all 1); dw  [outputs, d, p] contiguous or null (norms only)
//   sqnorm  zero-filled by the caller; so is dw if some output has no rows
template <typename T>
void outer_wgrad_cpu(const T* x, int64_t x_stride, const T* g, int64_t g_stride, int64_t p,
                     int64_t d, const Segments& segments, const T* weight, T* dw, T* sqnorm,
                     bool segment_norms, const Host<T>& host);

}  // namespace gradnorm
