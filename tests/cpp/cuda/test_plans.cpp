// The plans: that they cover the work, and how much workspace that takes.
#include <tuple>

#include "../check.h"
#include "kernels/cuda/plans.h"

namespace {

void expect(bool ok, const std::string& what) {
  if (!ok) std::printf("FAIL %s\n", what.c_str());
  check::failures += !ok;
}

void scaled_segment_sum() {
  for (const int64_t segments : {0, 1, 3, 64, 5000, 1 << 20}) {
    for (const int64_t mean : {0, 1, 7, 100, 5000}) {
      for (const int64_t width : {0, 1, 5, 33, 4096}) {
        for (const bool aligned : {false, true}) {
          const auto plan =
              gradnorm::plan_scaled_segment_sum(segments, segments * mean, width, 2, aligned);
          const std::string what = "scaled_segment_sum " + std::to_string(segments) + " x " +
                                   std::to_string(mean) + " x " + std::to_string(width);
          expect(plan.columns * plan.row_groups * plan.teams == gradnorm::kThreads,
                 what + ": threads");
          expect(plan.vector == (aligned ? 8 : 1), what + ": vector");
          expect(plan.column_blocks * plan.columns * plan.vector >= width, what + ": columns");
          expect(plan.blocks * plan.teams >= segments * plan.column_blocks * plan.chunks,
                 what + ": blocks");
          expect(plan.chunks >= 1 &&
                     plan.workspace == (plan.chunks > 1 ? plan.chunks * segments * width : 0),
                 what + ": workspace");
          // A second pass only where it gives more blocks something to do.
          expect(plan.chunks == 1 || plan.blocks <= 2 * 2112, what + ": chunks");
          expect(plan.workspace <= segments * mean * width / 8, what + ": small workspace");
        }
      }
    }
  }
  expect(gradnorm::plan_scaled_segment_sum(1 << 20, 1 << 20, 8, 4, true).row_groups == 1,
         "one row each");
  expect(gradnorm::plan_scaled_segment_sum(1, 1 << 20, 8, 4, true).chunks > 1, "one long segment");
}

void per_sample_wgrad() {
  for (const int64_t segments : {0, 1, 64, 100000}) {
    for (const int64_t width : {1, 700, 1 << 20}) {
      const auto plan = gradnorm::plan_per_sample_wgrad(segments, 2, segments + 5, width, 4, true);
      expect(plan.stretches * 128 >= width, "per_sample_wgrad: stretches");
      expect(plan.splits >= 1 && plan.splits <= plan.stretches, "per_sample_wgrad: splits");
      expect(plan.segment_blocks * 8 >= segments * plan.splits, "per_sample_wgrad: segments");
      expect(plan.group_blocks == 2 * segments * plan.splits, "per_sample_wgrad: groups");
      expect(plan.workspace == (plan.splits > 1 ? (segments + 5) * plan.splits : 0),
             "per_sample_wgrad: workspace");
    }
  }
}

void lookup() {
  const auto plan = gradnorm::plan_lookup(1000, 4096, 64, 2, 2, true);
  expect(plan.stretches == 16 && plan.blocks == 2000, "lookup: blocks");
  expect(plan.workspace == 3 * (1000 * 16 + 64), "lookup: workspace");
}

void outer() {
  for (const int64_t d : {1, 128, 4096, 128256}) {
    for (const int64_t units : {1, 2, 64}) {
      for (const bool dw : {false, true}) {
        using gradnorm::OuterKernel;
        for (const auto& [kernel, tiles_p, parts] : {std::tuple(OuterKernel::kAmpere, 32, 1),
                                                     {OuterKernel::kHopper, 22, 2},
                                                     {OuterKernel::kHopperWide, 16, 2}}) {
          const auto plan = gradnorm::plan_outer(kernel, d, 4096, 16384, units, dw, 132);
          expect(plan.tiles_d * 128 >= d && plan.tiles_p == tiles_p, "outer: tiles");
          expect(plan.splits >= 1 && plan.splits <= units, "outer: splits");
          expect(plan.parts == parts * plan.tiles_d * plan.tiles_p, "outer: parts");
          expect(plan.parts == gradnorm::outer_parts(kernel, d, 4096), "outer: parts");
          expect(plan.workspace == (dw && plan.splits > 1 ? plan.splits * d * 4096 : 0),
                 "outer: workspace");
        }
      }
    }
  }
  const auto splits = [](int64_t d, int64_t p, int64_t rows, int64_t units) {
    return gradnorm::plan_outer(gradnorm::OuterKernel::kAmpere, d, p, rows, units, true, 132)
        .splits;
  };
  expect(splits(256, 1024, 16384, 64) > 4, "outer: 16 tiles leave most of a card idle");
  expect(splits(4096, 4096, 16384, 64) > 1, "outer: 7.8 waves are evened out");
  expect(splits(256, 1024, 300, 64) == 1, "outer: a few rows are not worth a split");
  expect(splits(256, 1024, 16384, 1) == 1, "outer: one segment cannot be split");
  expect(splits(132 * 128, 128, 16384, 64) == 1, "outer: a full wave needs no splits");
}

}  // namespace

int main() {
  scaled_segment_sum();
  per_sample_wgrad();
  lookup();
  outer();
  return check::failures != 0;
}
