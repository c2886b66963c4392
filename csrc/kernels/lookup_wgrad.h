// The weight gradient of an embedding and its norms per segment and group.
#pragma once

#include "kernels/host.h"
#include "kernels/segments.h"

namespace gradnorm {

// With G[s][v] = sum_{r in s, ids[r] = v} g[r], rows of padding_idx left out (-1: none is):
//
//   dw[o]          = sum_{s: outputs[s] = o} weight[s] G[s]
//   sqnorm[s]      = |G[s]|^2
//   sqnorm[column] = |sum_{s in group} G[s]|^2     for every group of every level, unweighted
//
//   ids  [rows] in [0, vocabulary); g  [rows, d], inner stride 1
//   weight  [segments] or null (all 1)
//   dw  [outputs, vocabulary, d] contiguous and zero-filled, or null (norms only); sqnorm
//   zero-filled
template <typename T>
void lookup_wgrad_cpu(const int64_t* ids, const T* g, int64_t g_stride, int64_t d,
                      int64_t vocabulary, const Segments& segments, const T* weight,
                      int64_t padding_idx, T* dw, T* sqnorm, const Host<T>& host);

}  // namespace gradnorm
