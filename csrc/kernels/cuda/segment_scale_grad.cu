// Sums of products of rows by segment: scaled_segment_sum.h with an x.
#include "kernels/cuda/scaled_segment_sum.h"
#include "kernels/segment_scale_grad.h"

namespace gradnorm {
namespace {

template <typename T>
ScaledSegmentSum<T> products_of(const T* x, int64_t x_stride, ScaledSegmentSum<T> rows) {
  rows.x = x;
  rows.x_stride = x_stride;
  return rows;
}

}  // namespace

template <typename T>
int64_t segment_scale_grad_workspace(const T* x, int64_t x_stride, const T* g, int64_t g_stride,
                                     int64_t rows, int64_t width, int64_t segments) {
  const auto of_g = sums_of(g, g_stride, rows, width, nullptr, segments, {});
  return plan_of(products_of(x, x_stride, of_g)).workspace;
}

template <typename T>
void segment_scale_grad_cuda(const T* x, int64_t x_stride, const T* g, int64_t g_stride,
                             int64_t rows, int64_t width, const Accumulator<T>* shift,
                             const Accumulator<T>* scale, const int64_t* offsets, int64_t segments,
                             Accumulator<T>* out, Accumulator<T>* workspace, void* stream) {
  const auto of_g = sums_of(g, g_stride, rows, width, offsets, segments, out);
  auto given = products_of(x, x_stride, of_g);
  given.shift = shift;
  given.scale = scale;
  scaled_segment_sum("segment_scale_grad", given, plan_of(given), workspace, stream);
}

#define GRADNORM_FOR(T)                                                                           \
  template int64_t segment_scale_grad_workspace<T>(const T*, int64_t, const T*, int64_t, int64_t, \
                                                   int64_t, int64_t);                             \
  template void segment_scale_grad_cuda<T>(                                                       \
      const T*, int64_t, const T*, int64_t, int64_t, int64_t, const Accumulator<T>*,              \
      const Accumulator<T>*, const int64_t*, int64_t, Accumulator<T>*, Accumulator<T>*, void*);
GRADNORM_FOR(float)
GRADNORM_FOR(double)
GRADNORM_FOR(Half)
GRADNORM_FOR(BFloat16)
#undef GRADNORM_FOR

}  // namespace gradnorm
