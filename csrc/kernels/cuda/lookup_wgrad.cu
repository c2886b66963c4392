// All norms and the table's gradient from one reading of g. Rows come sorted by id, and those of
// one id in the order of the walk, so that the rows of a segment, of a group and of an output lie
// side by side within each run of equal ids. A warp goes through a run with a stretch of columns in
// registers; where a segment ends its sum is squared and added to the group around it, and so on.
// A square is written at the place of the row it ends with, which belongs to that segment (or
// group) alone: no atomics, and two short passes add the squares up.
#include "kernels/cuda/device.h"
#include "kernels/cuda/plans.h"
#include "kernels/lookup_wgrad.h"

namespace gradnorm {
namespace {

constexpr int kWarps = kThreads / kWarp;
constexpr int kLevelsAtOnce = 2;  // prompts and tasks; more go in further launches

template <typename T>
struct Runs {
  SortedLookup lookup;
  const T* g;
  int64_t g_stride, d, vocabulary, segments, levels, padding_idx, stretches;
  const int64_t *columns, *outputs;
  const Accumulator<T>* weight;
  Accumulator<T>* dw;
  Accumulator<T>* own_squares;    // [rows, stretches], or null: nobody wants them
  Accumulator<T>* group_squares;  // [levels, rows, stretches]
};

template <typename A, int kVector>
__device__ inline void add_to(A (&sum)[kVector], const A (&term)[kVector], A weight) {
#pragma unroll
  for (int j = 0; j < kVector; ++j) sum[j] += weight * term[j];
}

template <typename A, int kVector>
__device__ inline void write_square(const A (&sum)[kVector], A* square) {
  A total = 0;
#pragma unroll
  for (int j = 0; j < kVector; ++j) total += sum[j] * sum[j];
  total = sum_warp(total);
  if (threadIdx.x == 0) *square = total;
}

template <typename T, int kVector, int kLevels>  // at most so many levels
__global__ void __launch_bounds__(kThreads) lookup_runs_kernel(const Runs<T> given) {
  using A = Accumulator<T>;
  constexpr int kAhead = kVector == 1 ? 2 : 4;  // rows loaded at once; four single ones spill
  const SortedLookup& lookup = given.lookup;
  const int64_t item = int64_t(blockIdx.x) * kWarps + threadIdx.y;
  const int64_t begin = item / given.stretches, stretch = item % given.stretches;
  if (begin >= lookup.rows) return;
  const int64_t id = lookup.ids[begin];
  if (id == given.padding_idx || (begin > 0 && lookup.ids[begin - 1] == id)) return;
  const int64_t column = (stretch * kWarp + threadIdx.x) * kVector;

  A own[kVector] = {}, total[kVector] = {}, groups[kLevels + 1][kVector] = {};
  int64_t place = lookup.place[begin];
  int64_t segment = lookup.segment[place];
  bool goes_on = true;
  for (int64_t first = begin; goes_on; first += kAhead) {
    Vector<T, kVector> rows[kAhead] = {};
    int64_t places[kAhead + 1], segments[kAhead + 1];  // segment -1: the run is over
    places[0] = place;
    segments[0] = segment;
#pragma unroll
    for (int i = 0; i <= kAhead; ++i) {
      if (i > 0) {
        const int64_t at = first + i;
        const bool inside = segments[i - 1] >= 0 && at < lookup.rows && lookup.ids[at] == id;
        places[i] = inside ? lookup.place[at] : 0;
        segments[i] = inside ? lookup.segment[places[i]] : -1;
      }
      if (i < kAhead && segments[i] >= 0 && column < given.d) {
        const int64_t row = lookup.row ? lookup.row[places[i]] : places[i];
        rows[i] = load<kVector>(given.g + row * given.g_stride, column, given.d);
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t current = segments[i], next = segments[i + 1];
      if (current < 0) continue;
#pragma unroll
      for (int j = 0; j < kVector; ++j) own[j] += widen(rows[i].values[j]);
      if (next == current) continue;

      const int64_t square = places[i] * given.stretches + stretch;
      if (given.own_squares) write_square(own, given.own_squares + square);
      add_to(total, own, given.weight ? given.weight[current] : A(1));
      add_to(groups[0], own, A(1));
#pragma unroll
      for (int j = 0; j < kVector; ++j) own[j] = 0;
#pragma unroll
      for (int level = 0; level < kLevels; ++level) {
        const int64_t* group = given.columns + level * given.segments;
        if (level == given.levels) break;
        if (next >= 0 && group[next] == group[current]) break;  // and the groups around it go on
        write_square(groups[level],
                     given.group_squares + level * lookup.rows * given.stretches + square);
        add_to(groups[level + 1], groups[level], A(1));
#pragma unroll
        for (int j = 0; j < kVector; ++j) groups[level][j] = 0;
      }
      const bool output_ends =
          next < 0 || (given.outputs && given.outputs[next] != given.outputs[current]);
      if (given.dw && output_ends && column < given.d) {
        const int64_t output = given.outputs ? given.outputs[current] : 0;
        store(given.dw + (output * given.vocabulary + id) * given.d, column, given.d, total);
      }
      if (output_ends) {
#pragma unroll
        for (int j = 0; j < kVector; ++j) total[j] = 0;
      }
    }
    place = places[kAhead];
    segment = segments[kAhead];
    goes_on = segment >= 0;
  }
}

// parts[level][w] = the squares at the places of the walk's segment w; of level 0, to sqnorm.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    sum_places_kernel(const A* squares, int64_t rows, int64_t stretches, const int64_t* offsets,
                      const int64_t* walk, int64_t segments, A* parts, A* sqnorm) {
  const int64_t level = blockIdx.x / segments, w = blockIdx.x % segments;
  const A* of_level = squares + level * rows * stretches;
  const int64_t thread = threadIdx.y * kWarp + threadIdx.x;
  double total = 0;
  for (int64_t i = offsets[w] * stretches + thread; i < offsets[w + 1] * stretches; i += kThreads) {
    total += double(of_level[i]);
  }
  total = sum_warp(total);
  double* shared = shared_memory<double>();
  if (threadIdx.x == 0) shared[threadIdx.y] = total;
  __syncthreads();
  if (thread != 0) return;
  for (int warp = 1; warp < kWarps; ++warp) total += shared[warp];
  if (level == 0) sqnorm[walk[w]] = A(total);
  parts[level * segments + w] = A(total);
}

// A group's norm from its segments' parts: a warp where the group begins.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    sum_groups_kernel(const A* parts, const int64_t* columns, const int64_t* walk, int64_t segments,
                      int64_t levels, A* sqnorm) {
  const int64_t item = int64_t(blockIdx.x) * kWarps + threadIdx.y;
  const int64_t level = item / segments, begin = item % segments;
  if (level >= levels) return;
  const int64_t* group = columns + level * segments;
  const int64_t column = group[walk[begin]];
  if (begin > 0 && group[walk[begin - 1]] == column) return;
  double total = 0;
  for (int64_t w = begin + threadIdx.x; w < segments && group[walk[w]] == column; w += kWarp) {
    total += double(parts[level * segments + w]);
  }
  total = sum_warp(total);
  if (threadIdx.x == 0) sqnorm[column] = A(total);
}

template <typename T>
LookupPlan plan_of(const T* g, int64_t g_stride, int64_t rows, int64_t d,
                   const Segments& segments) {
  const bool aligned = is_vector_aligned(g, g_stride * sizeof(T));
  return plan_lookup(rows, d, segments.count, segments.levels, sizeof(T), aligned);
}

template <typename T, int kVector>
auto* runs_kernel(int64_t levels) {
  return levels == 0 ? &lookup_runs_kernel<T, kVector, 0>
                     : &lookup_runs_kernel<T, kVector, kLevelsAtOnce>;
}

}  // namespace

template <typename T>
int64_t lookup_wgrad_workspace(const T* g, int64_t g_stride, int64_t rows, int64_t d,
                               const Segments& segments) {
  return plan_of(g, g_stride, rows, d, segments).workspace;
}

template <typename T>
void lookup_wgrad_cuda(const SortedLookup& lookup, const T* g, int64_t g_stride, int64_t d,
                       int64_t vocabulary, const Segments& segments, const Accumulator<T>* weight,
                       int64_t padding_idx, Accumulator<T>* dw, Accumulator<T>* sqnorm,
                       Accumulator<T>* workspace, void* stream) {
  using A = Accumulator<T>;
  const char* operation = "lookup_wgrad";
  const auto plan = plan_of(g, g_stride, lookup.rows, d, segments);
  if (lookup.rows == 0 || d == 0) return;
  const int64_t of_level = lookup.rows * plan.stretches;
  A* parts = workspace + (segments.levels + 1) * of_level;
  check(operation, cudaMemsetAsync(workspace, 0, (segments.levels + 1) * of_level * sizeof(A),
                                   static_cast<cudaStream_t>(stream)));
  const dim3 threads(kWarp, kWarps);
  for (int64_t first = 0; first == 0 || first < segments.levels; first += kLevelsAtOnce) {
    const int64_t rest = segments.levels - first;
    const int64_t levels = rest < kLevelsAtOnce ? rest : kLevelsAtOnce;
    Runs<T> given = {lookup,
                     g,
                     g_stride,
                     d,
                     vocabulary,
                     segments.count,
                     levels,
                     padding_idx,
                     plan.stretches,
                     segments.columns + first * segments.count,
                     segments.outputs,
                     weight,
                     dw,
                     workspace,
                     workspace + (first + 1) * of_level};
    if (first > 0) given.dw = given.own_squares = nullptr;
    auto* kernel =
        plan.vector == 1 ? runs_kernel<T, 1>(levels) : runs_kernel<T, 16 / sizeof(T)>(levels);
    launch(operation, kernel, plan.blocks, threads, 0, stream, given);
  }
  launch(operation, &sum_places_kernel<A>, (segments.levels + 1) * segments.count, threads,
         kWarps * sizeof(double), stream, static_cast<const A*>(workspace), lookup.rows,
         plan.stretches, lookup.offsets, segments.walk, segments.count, parts, sqnorm);
  launch(operation, &sum_groups_kernel<A>, (segments.levels * segments.count + kWarps - 1) / kWarps,
         threads, 0, stream, static_cast<const A*>(parts + segments.count), segments.columns,
         segments.walk, segments.count, segments.levels, sqnorm);
}

#define GRADNORM_FOR(T)                                                                        \
  template int64_t lookup_wgrad_workspace<T>(const T*, int64_t, int64_t, int64_t,              \
                                             const Segments&);                                 \
  template void lookup_wgrad_cuda<T>(const SortedLookup&, const T*, int64_t, int64_t, int64_t, \
                                     const Segments&, const Accumulator<T>*, int64_t,          \
                                     Accumulator<T>*, Accumulator<T>*, Accumulator<T>*, void*);
GRADNORM_FOR(float)
GRADNORM_FOR(double)
GRADNORM_FOR(Half)
GRADNORM_FOR(BFloat16)
#undef GRADNORM_FOR

}  // namespace gradnorm
