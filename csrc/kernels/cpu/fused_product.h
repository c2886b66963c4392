// The matrix product of outer_wgrad over few rows, whose squares are summed and whose result is
// added where it belongs while it is in registers.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cpu/vectors.h"

namespace gradnorm {

// Of a tile of dw: rows of g and x, both with inner stride 1.
struct FusedRows {
  const float* g;
  int64_t g_stride, height;
  const float* x;
  int64_t x_stride, width;
  int64_t rows;
};

// sum_ij (sum_r g[r, i] x[r, j])^2, and on the way to[i, j] = scale sum_r g[r, i] x[r, j], or +=
// where it does not overwrite; to.data may be null. `scratch` is grown as needed.
using FusedProduct = double(const FusedRows& rows, float scale, bool overwrite, Tile<float> to,
                            std::vector<float>& scratch);

struct FusedKernel {
  const char* instructions;
  bool always;            // faster than the host's product, which otherwise takes many rows
  int64_t height, width;  // a tile is cut into pieces of this size: multiples waste nothing
  int64_t (*most_width)(int64_t rows);
  int64_t (*most_height)(int64_t width, int64_t rows);  // of a tile that wide
  FusedProduct* run;
};

// Measured on 2026-11-21 (Xeon, AVX-512, torch 2.13 with MKL), medians of 15 interleaved triples at
// 1024 x 256: with 128 rows a segment one product over all rows takes 1 / 1.03 of this time, and
// 1 / 1.19 of a product and a pass for each segment; with 512 rows 1 / 1.10 and 1 / 1.08.
constexpr int64_t kFusedRows = 256;  // of those that are not always faster

// One for each instruction set of this processor that has one, the fastest first.
const std::vector<FusedKernel>& fused_kernels();

// The one that runs: the first, or the one that GRADNORM_CPU_PRODUCT names; null where there is
// none. Throws std::invalid_argument where that names none of this processor's.
const FusedKernel* fused_kernel();

}  // namespace gradnorm
