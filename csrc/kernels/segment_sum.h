// Per-segment gradient of a bias.
#pragma once

#include "kernels/floats.h"
#include "kernels/host.h"

namespace gradnorm {

// out[s] = sum_{r in s} g[r]
//
//   g  [rows, width], inner stride 1; offsets  [segments + 1]; out  [segments, width] contiguous
template <typename T>
void segment_sum_cpu(const T* g, int64_t g_stride, int64_t width, const int64_t* offsets,
                     int64_t segments, T* out, const Host<T>& host);

// T is float, double, Half or BFloat16; workspace  as many entries as segment_sum_workspace says;
// offsets  may be null: one segment of all rows
template <typename T>
void segment_sum_cuda(const T* g, int64_t g_stride, int64_t rows, int64_t width,
                      const int64_t* offsets, int64_t segments, Accumulator<T>* out,
                      Accumulator<T>* workspace, void* stream);

template <typename T>
int64_t segment_sum_workspace(const T* g, int64_t g_stride, int64_t rows, int64_t width,
                              int64_t segments);

}  // namespace gradnorm
