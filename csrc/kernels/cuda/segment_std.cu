// One block per segment reads all ids and takes the values that are its own: nothing has to be
// sorted or counted first, and sums are formed in the same order at every call. It reads n ids per
// segment, which for the rewards of a step (thousands of values, in L2) costs less than a sort.
#include <cuda_runtime.h>

#include <cmath>
#include <stdexcept>
#include <string>

#include "kernels/segment_std.h"

namespace gradnorm {
namespace {

constexpr int kThreads = 256;

// Combines one value per thread, in a fixed tree, and gives every thread the result.
template <typename V, typename Combine>
__device__ V combine_block(V value, const Combine& combine) {
  __shared__ V shared[kThreads];
  __syncthreads();
  shared[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) {
      shared[threadIdx.x] = combine(shared[threadIdx.x], shared[threadIdx.x + half]);
    }
    __syncthreads();
  }
  return shared[0];
}

// Unlike fmin and fmax, these keep a NaN.
__device__ double lower(double a, double b) { return isnan(a) || a < b ? a : b; }
__device__ double higher(double a, double b) { return isnan(a) || a > b ? a : b; }

struct Sums {
  double total;
  long long count;
  double low, high;
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    segment_std_kernel(const T* __restrict__ values, const int64_t* __restrict__ ids, int64_t n,
                       int64_t ddof, SegmentStd<T> out) {
  const int64_t segment = blockIdx.x;
  Sums mine = {0, 0, INFINITY, -INFINITY};
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    if (ids[i] != segment) continue;
    const double value = double(values[i]);
    mine.total += value;
    mine.count += 1;
    mine.low = lower(mine.low, value);
    mine.high = higher(mine.high, value);
  }
  const Sums all = combine_block(mine, [](const Sums& a, const Sums& b) {
    return Sums{a.total + b.total, a.count + b.count, lower(a.low, b.low), higher(a.high, b.high)};
  });
  // Rounding moves the mean of equal values off them, and gives them a deviation.
  const double mean = all.low == all.high ? all.low : all.total / all.count;

  double squares = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    if (ids[i] != segment) continue;
    const double deviation = double(values[i]) - mean;
    squares += deviation * deviation;
  }
  squares = combine_block(squares, [](double a, double b) { return a + b; });

  if (threadIdx.x != 0) return;
  const int64_t freedom = all.count - ddof;
  out.mean[segment] = T(mean);
  out.std[segment] = T(freedom > 0 ? sqrt(squares / double(freedom)) : NAN);
  out.count[segment] = all.count;
  out.low[segment] = T(all.low);
  out.high[segment] = T(all.high);
}

}  // namespace

template <typename T>
void segment_std_cuda(const T* values, const int64_t* ids, int64_t n, int64_t segments,
                      int64_t ddof, const SegmentStd<T>& out, void* stream) {
  if (segments == 0) return;
  segment_std_kernel<<<static_cast<unsigned>(segments), kThreads, 0,
                       static_cast<cudaStream_t>(stream)>>>(values, ids, n, ddof, out);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) {
    throw std::runtime_error(std::string("segment_std: launch failed: ") +
                             cudaGetErrorString(error));
  }
}

template void segment_std_cuda<float>(const float*, const int64_t*, int64_t, int64_t, int64_t,
                                      const SegmentStd<float>&, void*);
template void segment_std_cuda<double>(const double*, const int64_t*, int64_t, int64_t, int64_t,
                                       const SegmentStd<double>&, void*);

}  // namespace gradnorm
