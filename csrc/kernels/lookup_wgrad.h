// The weight gradient of an embedding and its norms per segment and group.
#pragma once

#include "kernels/floats.h"
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

// The same of rows whose ids are sorted. A row's place is where it is in the order of the walk.
//
//   ids  [rows], not decreasing; place  [rows]: of the row with that id, rising where ids are equal
//   row  [rows]: which row of g is at a place, null: the same; segment  [rows]: of the row at a
//   place offsets  [segments + 1]: the first place of each segment in the order of the walk
struct SortedLookup {
  const int64_t *ids, *place, *row, *segment, *offsets;
  int64_t rows;
};

// T is float, double, Half or BFloat16; segments.offsets is not looked at; sqnorm, dw  zero-filled
//   workspace  as many entries as lookup_wgrad_workspace says
template <typename T>
void lookup_wgrad_cuda(const SortedLookup& lookup, const T* g, int64_t g_stride, int64_t d,
                       int64_t vocabulary, const Segments& segments, const Accumulator<T>* weight,
                       int64_t padding_idx, Accumulator<T>* dw, Accumulator<T>* sqnorm,
                       Accumulator<T>* workspace, void* stream);

template <typename T>
int64_t lookup_wgrad_workspace(const T* g, int64_t g_stride, int64_t rows, int64_t d,
                               const Segments& segments);

}  // namespace gradnorm
