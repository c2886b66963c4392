// Gradients that are formed per segment (of a bias, of a scale): their total and all squared norms.
#pragma once

#include "kernels/host.h"
#include "kernels/segments.h"

namespace gradnorm {

// sqnorm[s] = |sums[s]|^2, and for every group of segments.columns the squared norm of its sum;
// dw = sum_s weight[s] sums[s]
//
//   sums  [segments, width] contiguous; weight  [segments] or null for ones
//   dw    [width] or null;  sqnorm  one entry per segment and group, those without segments 0
template <typename T>
void per_sample_wgrad_cpu(const T* sums, int64_t width, const Segments& segments, const T* weight,
                          T* dw, T* sqnorm, int64_t columns, const Host<T>& host);

// sqnorm  zero-filled; workspace  as many entries as per_sample_wgrad_workspace says
template <typename T>
void per_sample_wgrad_cuda(const T* sums, int64_t width, const Segments& segments, const T* weight,
                           T* dw, T* sqnorm, int64_t columns, T* workspace, void* stream);

template <typename T>
int64_t per_sample_wgrad_workspace(const T* sums, int64_t width, const Segments& segments,
                                   int64_t columns, bool with_dw);

}  // namespace gradnorm
