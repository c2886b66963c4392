// How the CUDA kernels cut their work into blocks, and what workspace that takes: host arithmetic.
//
// The numbers are meant for cards of about 132 multiprocessors; none of them was measured yet.
#pragma once

#include <cstdint>

#include "kernels/outer_wgrad.h"

namespace gradnorm {

constexpr int kThreads = 256;  // of a block

// Sums of rows by segment. A team of columns x row_groups threads takes a chunk of one segment's
// rows and a stretch of its columns; a block is several teams.
struct ScaledSegmentSumPlan {
  int64_t vector;         // entries that a thread loads as one
  unsigned columns;       // threads side by side, a vector each
  unsigned row_groups;    // threads above each other: every row_groups-th row
  unsigned teams;         // of a block
  int64_t column_blocks;  // stretches of columns
  int64_t chunks;         // of a segment's rows; if more than one, a second pass adds them up
  int64_t blocks;
  int64_t workspace;  // entries: the sums of all chunks, 0 for one chunk
};
ScaledSegmentSumPlan plan_scaled_segment_sum(int64_t segments, int64_t rows, int64_t width,
                                             int64_t element_bytes, bool aligned);

// Norms and the total of gradients given per segment.
struct PerSampleWgradPlan {
  int64_t vector;
  int64_t stretches;           // of 32 vectors, side by side
  int64_t splits;              // of the stretches; the norms' parts are added up in a second pass
  int64_t segment_blocks;      // a warp takes a segment and a split
  int64_t group_blocks;        // a block takes a place of the walk, a level, and a split
  int64_t workspace;           // entries for the norms' parts, 0 for one split
  ScaledSegmentSumPlan total;  // of dw
};
PerSampleWgradPlan plan_per_sample_wgrad(int64_t segments, int64_t levels, int64_t columns,
                                         int64_t width, int64_t element_bytes, bool aligned);

// An embedding's gradient: a warp takes a run of equal ids and a stretch of columns.
struct LookupPlan {
  int64_t vector;
  int64_t stretches;
  int64_t blocks;
  int64_t workspace;  // squares [levels + 1, rows, stretches], then [levels + 1, segments]
};
LookupPlan plan_lookup(int64_t rows, int64_t width, int64_t segments, int64_t levels,
                       int64_t element_bytes, bool aligned);

// The fused product: tiles of dw, each formed from the rows of one split of the units.
struct OuterPlan {
  int64_t tiles_d, tiles_p;
  int64_t splits;
  int64_t parts;      // of every norm
  int64_t workspace;  // entries: dw of every split, 0 for one split
};
struct OuterTile {
  int64_t d, p;
  int64_t parts;  // of a norm that come from one tile
};
constexpr OuterTile kAmpereTile = {128, 128, 1}, kHopperTile = {128, 192, 2},
                    kHopperWideTile = {128, 256, 2};
// units  what a split must not cut: segments, or groups of them, at most so many; dw_is_sum whether
// dw is the sum of all splits' (else there is none, or one for each unit)
OuterPlan plan_outer(OuterKernel kernel, int64_t d, int64_t p, int64_t rows, int64_t units,
                     bool dw_is_sum, int64_t multiprocessors);
OuterPlan plan_outer(OuterKernel kernel, const OuterWalk& walk, const OuterProduct& product,
                     int64_t units, int64_t multiprocessors);

}  // namespace gradnorm
