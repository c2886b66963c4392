// Per-segment gradient of a normalisation layer's scale.
#pragma once

#include "kernels/floats.h"
#include "kernels/host.h"

namespace gradnorm {

// out[s] = sum_{r in s} g[r] * (x[r] - shift[r]) * scale[r]
//
//   x, g  [rows, width], inner stride 1; shift, scale  [rows] or null (0 and 1)
//   offsets  [segments + 1]; out  [segments, width] contiguous
template <typename T>
void segment_scale_grad_cpu(const T* x, int64_t x_stride, const T* g, int64_t g_stride,
                            int64_t width, const T* shift, const T* scale, const int64_t* offsets,
                            int64_t segments, T* out, const Host<T>& host);

// T is float, double, Half or BFloat16; workspace  as many entries as segment_scale_grad_workspace
// says
template <typename T>
void segment_scale_grad_cuda(const T* x, int64_t x_stride, const T* g, int64_t g_stride,
                             int64_t rows, int64_t width, const Accumulator<T>* shift,
                             const Accumulator<T>* scale, const int64_t* offsets, int64_t segments,
                             Accumulator<T>* out, Accumulator<T>* workspace, void* stream);

template <typename T>
int64_t segment_scale_grad_workspace(const T* x, int64_t x_stride, const T* g, int64_t g_stride,
                                     int64_t rows, int64_t width, int64_t segments);

}  // namespace gradnorm
