// Sums of products of rows by segment: segment_sums.h with an x.
#include "kernels/cuda/segment_sums.h"
#include "kernels/product_sums.h"

namespace gradnorm {
namespace {

template <typename T>
SegmentSumsPlan plan_of(const T* x, int64_t x_stride, const T* g, int64_t g_stride, int64_t rows,
                        int64_t width, int64_t segments) {
  const bool aligned =
      is_vector_aligned(x, x_stride * sizeof(T)) && is_vector_aligned(g, g_stride * sizeof(T));
  return plan_segment_sums(segments, rows, width, sizeof(T), aligned);
}

}  // namespace

template <typename T>
int64_t product_sums_workspace(const T* x, int64_t x_stride, const T* g, int64_t g_stride,
                               int64_t rows, int64_t width, int64_t segments) {
  return plan_of(x, x_stride, g, g_stride, rows, width, segments).workspace;
}

template <typename T>
void product_sums_cuda(const T* x, int64_t x_stride, const T* g, int64_t g_stride, int64_t rows,
                       int64_t width, const Accumulator<T>* shift, const Accumulator<T>* scale,
                       const int64_t* offsets, int64_t segments, Accumulator<T>* out,
                       Accumulator<T>* workspace, void* stream) {
  SegmentSums<T> given = {};
  given.x = x;
  given.x_stride = x_stride;
  given.g = g;
  given.g_stride = g_stride;
  given.shift = shift;
  given.scale = scale;
  given.offsets = offsets;
  given.rows = rows;
  given.segments = segments;
  given.width = width;
  given.out = out;
  const auto plan = plan_of(x, x_stride, g, g_stride, rows, width, segments);
  segment_sums("product_sums", given, plan, workspace, stream);
}

#define GRADNORM_FOR(T)                                                                            \
  template int64_t product_sums_workspace<T>(const T*, int64_t, const T*, int64_t, int64_t,        \
                                             int64_t, int64_t);                                    \
  template void product_sums_cuda<T>(const T*, int64_t, const T*, int64_t, int64_t, int64_t,       \
                                     const Accumulator<T>*, const Accumulator<T>*, const int64_t*, \
                                     int64_t, Accumulator<T>*, Accumulator<T>*, void*);
GRADNORM_FOR(float)
GRADNORM_FOR(double)
GRADNORM_FOR(Half)
GRADNORM_FOR(BFloat16)
#undef GRADNORM_FOR

}  // namespace gradnorm
