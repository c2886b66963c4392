// Sums of rows by segment: scaled_segment_sum.h without an x.
#include "kernels/cuda/scaled_segment_sum.h"
#include "kernels/segment_sum.h"

namespace gradnorm {

template <typename T>
int64_t segment_sum_workspace(const T* g, int64_t g_stride, int64_t rows, int64_t width,
                              int64_t segments) {
  return plan_of(sums_of(g, g_stride, rows, width, nullptr, segments, {})).workspace;
}

template <typename T>
void segment_sum_cuda(const T* g, int64_t g_stride, int64_t rows, int64_t width,
                      const int64_t* offsets, int64_t segments, Accumulator<T>* out,
                      Accumulator<T>* workspace, void* stream) {
  const auto given = sums_of(g, g_stride, rows, width, offsets, segments, out);
  scaled_segment_sum("segment_sum", given, plan_of(given), workspace, stream);
}

#define GRADNORM_FOR(T)                                                                           \
  template int64_t segment_sum_workspace<T>(const T*, int64_t, int64_t, int64_t, int64_t);        \
  template void segment_sum_cuda<T>(const T*, int64_t, int64_t, int64_t, const int64_t*, int64_t, \
                                    Accumulator<T>*, Accumulator<T>*, void*);
GRADNORM_FOR(float)
GRADNORM_FOR(double)
GRADNORM_FOR(Half)
GRADNORM_FOR(BFloat16)
#undef GRADNORM_FOR

}  // namespace gradnorm
