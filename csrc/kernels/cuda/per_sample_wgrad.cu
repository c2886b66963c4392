// One launch for all norms: a warp for a segment's, a block for a group's, which is that of the
// stretch of the walk that begins where the block is; a block where no group begins is done.
// The total is the sum of one segment of all rows (scaled_segment_sum.h). Squares are added up in
// double.
#include "kernels/cuda/partials.h"
#include "kernels/cuda/scaled_segment_sum.h"
#include "kernels/per_sample_wgrad.h"

namespace gradnorm {
namespace {

constexpr int kWarps = kThreads / kWarp;

template <typename T>
struct PerSampleNorms {
  const T* sums;
  int64_t width, segments, levels;
  const int64_t *walk, *columns;
  T* norms;  // [columns, splits]
  int64_t splits, stretches, segment_blocks;
};

template <typename T, int kVector>
__device__ double squared(const T (&values)[kVector]) {
  T square = 0;
#pragma unroll
  for (int j = 0; j < kVector; ++j) square += values[j] * values[j];
  return double(square);
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads) per_sample_norms_kernel(const PerSampleNorms<T> given) {
  const int lane = threadIdx.x, warp = threadIdx.y;
  double total = 0;
  if (blockIdx.x < given.segment_blocks) {
    const int64_t item = int64_t(blockIdx.x) * kWarps + warp;
    const int64_t segment = item / given.splits, split = item % given.splits;
    if (segment >= given.segments) return;
    const T* row = given.sums + segment * given.width;
    for (int64_t stretch = split; stretch < given.stretches; stretch += given.splits) {
      const int64_t column = (stretch * kWarp + lane) * kVector;
      if (column >= given.width) continue;
      total += squared(load<kVector>(row, column, given.width).values);
    }
    total = sum_warp(total);
    if (lane == 0) given.norms[item] = T(total);
    return;
  }

  const int64_t item = int64_t(blockIdx.x) - given.segment_blocks;
  const int64_t split = item % given.splits, begin = item / given.splits % given.segments;
  const int64_t* group = given.columns + item / given.splits / given.segments * given.segments;
  const int64_t column_of_group = group[given.walk[begin]];
  if (begin > 0 && group[given.walk[begin - 1]] == column_of_group) return;

  auto* shared = shared_memory<Vector<T, kVector>>();
  for (int64_t stretch = split; stretch < given.stretches; stretch += given.splits) {
    const int64_t column = (stretch * kWarp + lane) * kVector;
    T sum[kVector] = {};
    for (int64_t place = begin + warp; place < given.segments; place += kWarps) {
      const int64_t segment = given.walk[place];
      if (group[segment] != column_of_group) break;
      if (column >= given.width) continue;
      const auto row = load<kVector>(given.sums + segment * given.width, column, given.width);
#pragma unroll
      for (int j = 0; j < kVector; ++j) sum[j] += row.values[j];
    }
    Vector<T, kVector>& mine = shared[warp * kWarp + lane];
    for (int j = 0; j < kVector; ++j) mine.values[j] = sum[j];
    for (int half = kWarps / 2; half > 0; half /= 2) {
      __syncthreads();
      if (warp >= half) continue;
      const Vector<T, kVector>& other = shared[(warp + half) * kWarp + lane];
      for (int j = 0; j < kVector; ++j) mine.values[j] = sum[j] += other.values[j];
    }
    if (warp == 0) total += squared(sum);
    __syncthreads();
  }
  if (warp > 0) return;
  total = sum_warp(total);
  if (lane == 0) given.norms[column_of_group * given.splits + split] = T(total);
}

template <typename T>
PerSampleWgradPlan plan_of(const T* sums, int64_t width, const Segments& segments,
                           int64_t columns) {
  const bool aligned = is_vector_aligned(sums, width * sizeof(T));
  return plan_per_sample_wgrad(segments.count, segments.levels, columns, width, sizeof(T), aligned);
}

}  // namespace

template <typename T>
int64_t per_sample_wgrad_workspace(const T* sums, int64_t width, const Segments& segments,
                                   int64_t columns, bool with_dw) {
  const auto plan = plan_of(sums, width, segments, columns);
  return plan.workspace + (with_dw ? plan.total.workspace : 0);
}

template <typename T>
void per_sample_wgrad_cuda(const T* sums, int64_t width, const Segments& segments, const T* weight,
                           T* dw, T* sqnorm, int64_t columns, T* workspace, void* stream) {
  const char* operation = "per_sample_wgrad";
  const auto plan = plan_of(sums, width, segments, columns);
  if (width > 0 && segments.count > 0) {
    PerSampleNorms<T> given = {
        sums,   width,       segments.count, segments.levels,    segments.walk, segments.columns,
        sqnorm, plan.splits, plan.stretches, plan.segment_blocks};
    if (plan.splits > 1) {
      given.norms = workspace;
      // A group without segments has no parts.
      check(operation, cudaMemsetAsync(workspace, 0, plan.workspace * sizeof(T),
                                       static_cast<cudaStream_t>(stream)));
    }
    auto* kernel = plan.vector == 1 ? &per_sample_norms_kernel<T, 1>
                                    : &per_sample_norms_kernel<T, 16 / sizeof(T)>;
    const size_t shared = segments.levels ? kThreads * plan.vector * sizeof(T) : 0;
    launch(operation, kernel, plan.segment_blocks + plan.group_blocks, dim3(kWarp, kWarps), shared,
           stream, given);
    if (plan.splits > 1) {
      sum_partials(operation, static_cast<const T*>(workspace), columns, plan.splits, sqnorm,
                   stream);
    }
  }
  if (!dw) return;
  auto total = sums_of(sums, width, segments.count, width, nullptr, 1, dw);
  total.scale = weight;
  scaled_segment_sum(operation, total, plan.total, workspace + plan.workspace, stream);
}

#define GRADNORM_FOR(T)                                                                        \
  template int64_t per_sample_wgrad_workspace<T>(const T*, int64_t, const Segments&, int64_t,  \
                                                 bool);                                        \
  template void per_sample_wgrad_cuda<T>(const T*, int64_t, const Segments&, const T*, T*, T*, \
                                         int64_t, T*, void*);
GRADNORM_FOR(float)
GRADNORM_FOR(double)
#undef GRADNORM_FOR

}  // namespace gradnorm
