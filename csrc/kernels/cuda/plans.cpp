#include "kernels/cuda/plans.h"

#include <algorithm>

namespace gradnorm {
namespace {

constexpr int64_t kWarpSize = 32;
constexpr int64_t kEnough = 2112;     // blocks: 16 for each of 132 multiprocessors
constexpr int64_t kRowsInTurn = 8;    // that a thread adds up at least, before more threads share
constexpr int64_t kMostChunks = 256;  // the second pass adds them up one after the other

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t power_of_two(int64_t least) {
  int64_t power = 1;
  while (power < least) power *= 2;
  return power;
}

int64_t vector_of(int64_t element_bytes, bool aligned) { return aligned ? 16 / element_bytes : 1; }

const OuterTile& tile_of(OuterKernel kernel) {
  switch (kernel) {
    case OuterKernel::kHopper:
      return kHopperTile;
    case OuterKernel::kHopperWide:
      return kHopperWideTile;
    default:
      return kAmpereTile;
  }
}

}  // namespace

ScaledSegmentSumPlan plan_scaled_segment_sum(int64_t segments, int64_t rows, int64_t width,
                                             int64_t element_bytes, bool aligned) {
  ScaledSegmentSumPlan plan = {};
  plan.vector = vector_of(element_bytes, aligned);
  const int64_t vectors = ceil_div(width, plan.vector);
  const int64_t mean = segments ? ceil_div(rows, segments) : 0;
  const int64_t columns = std::clamp<int64_t>(power_of_two(vectors), 1, kWarpSize);
  const int64_t row_groups =
      std::clamp<int64_t>(power_of_two(ceil_div(mean, kRowsInTurn)), 1, kThreads / columns);
  plan.columns = static_cast<unsigned>(columns);
  plan.row_groups = static_cast<unsigned>(row_groups);
  plan.teams = static_cast<unsigned>(kThreads / (columns * row_groups));
  plan.column_blocks = ceil_div(vectors, columns);
  const int64_t teams = segments * plan.column_blocks;
  const int64_t blocks = std::max<int64_t>(1, ceil_div(teams, plan.teams));
  plan.chunks = std::clamp<int64_t>(std::min(kEnough / blocks, mean / (kRowsInTurn * row_groups)),
                                    1, kMostChunks);
  plan.blocks = ceil_div(teams * plan.chunks, plan.teams);
  plan.workspace = plan.chunks > 1 ? plan.chunks * segments * width : 0;
  return plan;
}

PerSampleWgradPlan plan_per_sample_wgrad(int64_t segments, int64_t levels, int64_t columns,
                                         int64_t width, int64_t element_bytes, bool aligned) {
  PerSampleWgradPlan plan = {};
  plan.vector = vector_of(element_bytes, aligned);
  plan.stretches = ceil_div(ceil_div(width, plan.vector), kWarpSize);
  const int64_t entries = std::max<int64_t>(1, segments);
  const int64_t splits = std::min(plan.stretches, ceil_div(kEnough, entries));
  plan.splits = std::max<int64_t>(1, splits);
  plan.segment_blocks = ceil_div(segments * plan.splits, kThreads / kWarpSize);
  plan.group_blocks = levels * segments * plan.splits;
  plan.workspace = plan.splits > 1 ? columns * plan.splits : 0;
  plan.total = plan_scaled_segment_sum(1, segments, width, element_bytes, aligned);
  return plan;
}

LookupPlan plan_lookup(int64_t rows, int64_t width, int64_t segments, int64_t levels,
                       int64_t element_bytes, bool aligned) {
  LookupPlan plan = {};
  plan.vector = vector_of(element_bytes, aligned);
  plan.stretches = ceil_div(ceil_div(width, plan.vector), kWarpSize);
  plan.blocks = ceil_div(rows * plan.stretches, kThreads / kWarpSize);
  plan.workspace = (levels + 1) * (rows * plan.stretches + segments);
  return plan;
}

OuterPlan plan_outer(OuterKernel kernel, int64_t d, int64_t p, int64_t rows, int64_t units,
                     bool dw_is_sum, int64_t multiprocessors) {
  const OuterTile& tile = tile_of(kernel);
  OuterPlan plan = {};
  plan.tiles_d = ceil_div(d, tile.d);
  plan.tiles_p = ceil_div(p, tile.p);
  const int64_t tiles = plan.tiles_d * plan.tiles_p;
  plan.parts = tiles * tile.parts;
  // Time in rows that a tile could be multiplied with meanwhile: writing a tile and reading it back
  // takes about 64. Shares of less than 256 rows are all overhead.
  constexpr int64_t kSlab = 64, kLeastRows = 256, kMostSplits = 16;
  plan.splits = 1;
  int64_t best = ceil_div(tiles, multiprocessors) * rows;
  const int64_t most = std::min({units, kMostSplits, std::max<int64_t>(1, rows / kLeastRows)});
  for (int64_t splits = 2; splits <= most; ++splits) {
    const int64_t waves = ceil_div(tiles * splits, multiprocessors);
    const int64_t time = waves * (ceil_div(rows, splits) + (dw_is_sum ? kSlab : 0));
    if (time < best) {
      best = time;
      plan.splits = splits;
    }
  }
  plan.workspace = dw_is_sum && plan.splits > 1 ? plan.splits * d * p : 0;
  return plan;
}

OuterPlan plan_outer(OuterKernel kernel, const OuterWalk& walk, const OuterProduct& product,
                     int64_t units, int64_t multiprocessors) {
  return plan_outer(kernel, product.d, product.p, product.rows, units, product.dw && !walk.output,
                    multiprocessors);
}

int64_t outer_parts(OuterKernel kernel, int64_t d, int64_t p) {
  return plan_outer(kernel, d, p, 0, 1, false, 1).parts;
}

int64_t outer_workspace(OuterKernel kernel, const OuterWalk& walk, const OuterProduct& product,
                        int64_t units, int64_t multiprocessors) {
  return plan_outer(kernel, walk, product, units, multiprocessors).workspace;
}

}  // namespace gradnorm
