// Sums of rows by segment: segment_sums.h without an x.
#include "kernels/cuda/segment_sums.h"
#include "kernels/sum_sums.h"

namespace gradnorm {

template <typename T>
int64_t sum_sums_workspace(const T* g, int64_t g_stride, int64_t rows, int64_t width,
                           int64_t segments) {
  return plan_of(sums_of(g, g_stride, rows, width, nullptr, segments, {})).workspace;
}

template <typename T>
void sum_sums_cuda(const T* g, int64_t g_stride, int64_t rows, int64_t width,
                   const int64_t* offsets, int64_t segments, Accumulator<T>* out,
                   Accumulator<T>* workspace, void* stream) {
  const auto given = sums_of(g, g_stride, rows, width, offsets, segments, out);
  segment_sums("sum_sums", given, plan_of(given), workspace, stream);
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
