// Sums of (products of) rows by segment, one launch; few and long segments are cut into chunks, and
// a second launch adds their sums up, in order.
#pragma once

#include "kernels/cuda/device.h"
#include "kernels/cuda/plans.h"

namespace gradnorm {

// out[c][s] = sum of g[r] * (x[r] - shift[r]) * scale[r] over chunk c of segment s
template <typename T>
struct ScaledSegmentSum {
  const T* x;  // null: ones
  int64_t x_stride;
  const T* g;
  int64_t g_stride;
  const Accumulator<T>*shift, *scale;  // null: 0 and 1
  const int64_t* offsets;              // null: one segment of `rows` rows
  int64_t rows, segments, width;
  Accumulator<T>* out;
  int64_t chunks, column_blocks;
};

// Static: files that include this are built for different architectures, and a kernel that they
// shared would be looked for in one of them.
template <typename T, int kVector>
static __global__ void __launch_bounds__(kThreads)
    scaled_segment_sum_kernel(const ScaledSegmentSum<T> given) {
  using A = Accumulator<T>;
  constexpr int kAhead = 4;  // rows whose loads are on their way at once
  const int64_t team = int64_t(blockIdx.x) * blockDim.z + threadIdx.z;
  const int64_t block = team % given.column_blocks;
  const int64_t segment = team / given.column_blocks % given.segments;
  const int64_t chunk = team / given.column_blocks / given.segments;
  const int64_t column = (block * blockDim.x + threadIdx.x) * kVector;
  const bool exists = chunk < given.chunks && column < given.width;

  int64_t begin = 0, end = 0;
  if (exists) {
    begin = given.offsets ? given.offsets[segment] : 0;
    end = given.offsets ? given.offsets[segment + 1] : given.rows;
    const int64_t of_chunk = (end - begin + given.chunks - 1) / given.chunks;
    begin += chunk * of_chunk;
    end = begin + of_chunk < end ? begin + of_chunk : end;
  }
  A total[kVector] = {};
  const int64_t step = blockDim.y;
  for (int64_t first = begin + threadIdx.y; first < end; first += kAhead * step) {
    Vector<T, kVector> g[kAhead] = {}, x[kAhead] = {};
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t row = first + i * step;
      if (row >= end) continue;
      g[i] = load<kVector>(given.g + row * given.g_stride, column, given.width);
      if (given.x) x[i] = load<kVector>(given.x + row * given.x_stride, column, given.width);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t row = first + i * step;
      if (row >= end) continue;
      const A shift = given.shift ? given.shift[row] : A(0);
      const A scale = given.scale ? given.scale[row] : A(1);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const A factor = given.x ? (widen(x[i].values[j]) - shift) * scale : scale;
        total[j] += widen(g[i].values[j]) * factor;
      }
    }
  }

  if (blockDim.y > 1) {  // a tree over the row groups
    Vector<A, kVector>* shared =
        shared_memory<Vector<A, kVector>>() + threadIdx.z * blockDim.y * blockDim.x + threadIdx.x;
    Vector<A, kVector>& mine = shared[threadIdx.y * blockDim.x];
    for (int j = 0; j < kVector; ++j) mine.values[j] = total[j];
    for (unsigned half = blockDim.y / 2; half > 0; half /= 2) {
      __syncthreads();
      if (threadIdx.y < half) {
        const Vector<A, kVector>& other = shared[(threadIdx.y + half) * blockDim.x];
        for (int j = 0; j < kVector; ++j) mine.values[j] = total[j] += other.values[j];
      }
    }
  }
  if (exists && threadIdx.y == 0) {
    A* out = given.out + (chunk * given.segments + segment) * given.width;
    store(out, column, given.width, total);
  }
}

// Of rows alone. `out`  [segments, width]
template <typename T>
ScaledSegmentSum<T> sums_of(const T* g, int64_t g_stride, int64_t rows, int64_t width,
                            const int64_t* offsets, int64_t segments, Accumulator<T>* out) {
  ScaledSegmentSum<T> given = {};
  given.g = g;
  given.g_stride = g_stride;
  given.rows = rows;
  given.width = width;
  given.offsets = offsets;
  given.segments = segments;
  given.out = out;
  return given;
}

template <typename T>
ScaledSegmentSumPlan plan_of(const ScaledSegmentSum<T>& given) {
  const bool aligned = is_vector_aligned(given.x, given.x_stride * sizeof(T)) &&
                       is_vector_aligned(given.g, given.g_stride * sizeof(T));
  return plan_scaled_segment_sum(given.segments, given.rows, given.width, sizeof(T), aligned);
}

// workspace  plan.workspace entries
template <typename T>
void scaled_segment_sum(const char* operation, ScaledSegmentSum<T> given,
                        const ScaledSegmentSumPlan& plan, Accumulator<T>* workspace, void* stream) {
  using A = Accumulator<T>;
  constexpr int kWide = 16 / sizeof(T);
  if (given.segments == 0 || given.width == 0) return;
  A* out = given.out;
  if (plan.chunks > 1) given.out = workspace;
  given.chunks = plan.chunks;
  given.column_blocks = plan.column_blocks;
  const dim3 threads(plan.columns, plan.row_groups, plan.teams);
  const size_t shared = plan.row_groups > 1 ? kThreads * plan.vector * sizeof(A) : 0;
  auto* kernel =
      plan.vector == 1 ? &scaled_segment_sum_kernel<T, 1> : &scaled_segment_sum_kernel<T, kWide>;
  launch(operation, kernel, plan.blocks, threads, shared, stream, given);
  if (plan.chunks == 1) return;
  const int64_t width = given.segments * given.width;
  const auto parts = sums_of<A>(workspace, width, plan.chunks, width, nullptr, 1, out);
  ScaledSegmentSumPlan second = plan_of(parts);
  second.chunks = 1;
  second.blocks = (second.column_blocks + second.teams - 1) / second.teams;
  scaled_segment_sum(operation, parts, second, static_cast<A*>(nullptr), stream);
}

}  // namespace gradnorm
