// Sums of rows by segment: segment_sums.h without an x.
#include "kernels/cuda/segment_sums.h"
#include "kernels/sum_sums.h"

namespace gradnorm {

template <typename T>
int64_t sum_sums_workspace(const T* g, int64_t g_stride, int64_t rows, int64_t width,
                           int64_t segments) {
  const bool aligned = is_vector_aligned(g, g_stride * sizeof(T));
  return plan_segment_sums(segments, rows, width, sizeof(T), aligned).workspace;
}

template <typename T>
void sum_sums_cuda(const T* g, int64_t g_stride, int64_t rows, int64_t width,
                   const int64_t* offsets, int64_t segments, Accumulator<T>* out,
                   Accumulator<T>* workspace, void* stream) {
  SegmentSums<T> given = {};
  given.g = g;
  given.g_stride = g_stride;
  given.offsets = offsets;
  given.rows = rows;
  given.segments = segments;
  given.width = width;
  given.out = out;
  const bool aligned = is_vector_aligned(g, g_stride * sizeof(T));
  const auto plan = plan_segment_sums(segments, rows, width, sizeof(T), aligned);
  segment_sums("sum_sums", given, plan, workspace, stream);
}

#define GRADNORM_FOR(T)                                                                        \
  template int64_t sum_sums_workspace<T>(const T*, int64_t, int64_t, int64_t, int64_t);        \
  template void sum_sums_cuda<T>(const T*, int64_t, int64_t, int64_t, const int64_t*, int64_t, \
                                 Accumulator<T>*, Accumulator<T>*, void*);
GRADNORM_FOR(float)
GRADNORM_FOR(double)
GRADNORM_FOR(Half)
GRADNORM_FOR(BFloat16)
#undef GRADNORM_FOR

}  // namespace gradnorm
