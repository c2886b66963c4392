// Two passes in double over the values of a segment, by a warp where segments are short, else by a
// block. They are either given in sorted order, or, where a step has few values, found by looking
// at all ids: nothing has to be sorted or counted first. Sums are formed in the same order at every
// call.
#include "kernels/cuda/device.h"
#include "kernels/cuda/plans.h"
#include "kernels/segment_std.h"

namespace gradnorm {
namespace {

constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kLong = 256;  // values of a segment from which on a block takes it

// Unlike fmin and fmax, these keep a NaN.
__device__ inline double lower(double a, double b) { return a != a || a < b ? a : b; }
__device__ inline double higher(double a, double b) { return a != a || a > b ? a : b; }

// `combine` of one value per thread of the team, in every thread.
template <bool kIsBlock, typename V, typename Combine>
__device__ V combine_team(V value, const Combine& combine) {
  value = combine_warp(value, combine);
  if (!kIsBlock) return value;
  V* shared = shared_memory<V>();
  __syncthreads();
  if (threadIdx.x == 0) shared[threadIdx.y] = value;
  __syncthreads();
  value = shared[0];
  for (int warp = 1; warp < kWarps; ++warp) value = combine(value, shared[warp]);
  return value;
}

template <typename T>
struct Values {
  const T* values;
  const int64_t* ids;    // null where they are sorted
  const int64_t* order;  // these two are null where they are not
  const int64_t* offsets;
  int64_t n, segments, ddof;
};

template <typename T, bool kIsBlock, bool kIsSorted>
__global__ void __launch_bounds__(kThreads)
    segment_std_kernel(const Values<T> given, const SegmentStd<T> out) {
  const int64_t segment =
      kIsBlock ? int64_t(blockIdx.x) : int64_t(blockIdx.x) * kWarps + threadIdx.y;
  if (segment >= given.segments) return;
  const int64_t step = kIsBlock ? kThreads : kWarp;
  const int64_t place = kIsBlock ? threadIdx.y * kWarp + threadIdx.x : threadIdx.x;
  const int64_t begin = (kIsSorted ? given.offsets[segment] : 0) + place;
  const int64_t end = kIsSorted ? given.offsets[segment + 1] : given.n;

  double total = 0, low = INFINITY, high = -INFINITY;
  long long count = 0;
  for (int64_t i = begin; i < end; i += step) {
    if (!kIsSorted && given.ids[i] != segment) continue;
    const double value = double(given.values[kIsSorted ? given.order[i] : i]);
    total += value;
    count += 1;
    low = lower(low, value);
    high = higher(high, value);
  }
  const auto add = [](auto a, auto b) { return a + b; };
  total = combine_team<kIsBlock>(total, add);
  count = combine_team<kIsBlock>(count, add);
  low = combine_team<kIsBlock>(low, lower);
  high = combine_team<kIsBlock>(high, higher);
  // Rounding moves the mean of equal values off them, and gives them a deviation.
  const double mean = low == high ? low : count > 0 ? total / double(count) : NAN;

  double squares = 0;
  for (int64_t i = begin; i < end; i += step) {
    if (!kIsSorted && given.ids[i] != segment) continue;
    const double deviation = double(given.values[kIsSorted ? given.order[i] : i]) - mean;
    squares += deviation * deviation;
  }
  squares = combine_team<kIsBlock>(squares, add);

  if (place != 0) return;
  const long long freedom = count - given.ddof;
  out.mean[segment] = T(mean);
  out.std[segment] = T(freedom > 0 ? sqrt(squares / double(freedom)) : NAN);
  out.count[segment] = count;
  out.low[segment] = T(low);
  out.high[segment] = T(high);
}

template <typename T>
void run(bool is_block, bool is_sorted, const Values<T>& given, const SegmentStd<T>& out,
         void* stream) {
  auto* kernel = is_sorted ? is_block ? &segment_std_kernel<T, true, true>
                                      : &segment_std_kernel<T, false, true>
                           : &segment_std_kernel<T, true, false>;
  const int64_t blocks = is_block ? given.segments : (given.segments + kWarps - 1) / kWarps;
  launch("segment_std", kernel, blocks, dim3(kWarp, kWarps), is_block ? kWarps * sizeof(double) : 0,
         stream, given, out);
}

}  // namespace

template <typename T>
void segment_std_cuda(const T* values, const int64_t* ids, int64_t n, int64_t segments,
                      int64_t ddof, const SegmentStd<T>& out, void* stream) {
  run<T>(true, false, {values, ids, nullptr, nullptr, n, segments, ddof}, out, stream);
}

template <typename T>
void segment_std_sorted_cuda(const T* values, const int64_t* order, const int64_t* offsets,
                             int64_t n, int64_t segments, int64_t ddof, const SegmentStd<T>& out,
                             void* stream) {
  run<T>(n >= kLong * segments, true, {values, nullptr, order, offsets, n, segments, ddof}, out,
         stream);
}

#define GRADNORM_FOR(T)                                                                       \
  template void segment_std_cuda<T>(const T*, const int64_t*, int64_t, int64_t, int64_t,      \
                                    const SegmentStd<T>&, void*);                             \
  template void segment_std_sorted_cuda<T>(const T*, const int64_t*, const int64_t*, int64_t, \
                                           int64_t, int64_t, const SegmentStd<T>&, void*);
GRADNORM_FOR(float)
GRADNORM_FOR(double)
#undef GRADNORM_FOR

}  // namespace gradnorm
