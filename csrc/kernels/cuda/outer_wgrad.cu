// The fused product for sm_80 and later: a block forms a 128 x 128 tile of dw by mma.sync from rows
// that cp.async brings, 32 at a time, several steps ahead. One loop goes through all items; where
// an inner sum ends, its tile is squared and added to the second tile in registers: the total, or
// the outer sum, which is squared and added to dw in memory where it ends. Rows past an item's end
// are zeros in both operands, so that nothing of a neighbour leaks, not even a NaN.
#include "kernels/cuda/device.h"
#include "kernels/cuda/outer_walk.h"
#include "kernels/cuda/plans.h"
#include "kernels/cuda/tensor_core.h"
#include "kernels/outer_wgrad.h"

namespace gradnorm {
namespace {

constexpr int kTile = kAmpereTile.d, kRows = 32, kStages = 4;
static_assert(kAmpereTile.d == kTile && kAmpereTile.p == kTile);
constexpr int kWarps = kThreads / kWarp;
constexpr int kWarpsP = 4;  // 2 x 4 warps, each 64 x 32 of the tile
constexpr int kWarpD = 64, kWarpP = 32;
constexpr int kPiecesD = kWarpD / 16, kPiecesP = kWarpP / 8;
constexpr int kChunk = 8;  // entries of 16 bytes
constexpr int kOperand = kRows * kTile;
constexpr size_t kSharedBytes = kStages * 2 * kOperand * 2 + kWarps * sizeof(float);

using Tile = float[kPiecesD][kPiecesP][4];

// Where an entry of a [kRows, kTile] operand is: eight rows of one chunk lie in different banks.
__device__ inline int place_of(int row, int column) {
  return row * kTile + ((column / kChunk) ^ (row % 8)) * kChunk + column % kChunk;
}

// Starts to copy rows row .. row + kRows, columns column .. column + kTile; zeros from `end` on.
template <typename T>
__device__ inline void fetch(T* shared, const T* rows, int64_t stride, int64_t row, int64_t end,
                             int64_t column, int64_t width) {
  constexpr int kChunks = kTile / kChunk;
#pragma unroll
  for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
    const int piece = i * kThreads + threadIdx.x;
    const int r = piece / kChunks, c = piece % kChunks * kChunk;
    const bool inside = row + r < end && column + c < width;
    const T* from = inside ? rows + (row + r) * stride + column + c : rows;
    copy_async(shared + place_of(r, c), from, inside);
  }
}

// sum += g^T x over the kRows rows in shared memory.
template <typename T>
__device__ inline void multiply(Tile& sum, const T* g, const T* x) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int d = warp / kWarpsP * kWarpD, p = warp % kWarpsP * kWarpP;
#pragma unroll
  for (int row = 0; row < kRows; row += 16) {
    unsigned of_g[kPiecesD][4], of_x[kPiecesP / 2][4];
    // Matrices of g: rows 0 to 7 of columns 0 to 7, then 8 to 15; rows 8 to 15 of these.
#pragma unroll
    for (int i = 0; i < kPiecesD; ++i) {
      const int r = row + lane / 16 * 8 + lane % 8, c = d + i * 16 + lane / 8 % 2 * 8;
      load_matrices_transposed(of_g[i], g + place_of(r, c));
    }
    // Of x: rows 0 to 7, then 8 to 15, of columns 0 to 7; these of columns 8 to 15.
#pragma unroll
    for (int j = 0; j < kPiecesP / 2; ++j) {
      const int r = row + lane / 8 % 2 * 8 + lane % 8, c = p + j * 16 + lane / 16 * 8;
      load_matrices_transposed(of_x[j], x + place_of(r, c));
    }
#pragma unroll
    for (int i = 0; i < kPiecesD; ++i) {
#pragma unroll
      for (int j = 0; j < kPiecesP; ++j) {
        multiply_add<T>(sum[i][j], of_g[i], of_x[j / 2][j % 2 * 2], of_x[j / 2][j % 2 * 2 + 1]);
      }
    }
  }
}

__device__ inline void add(Tile& sum, const Tile& term, float weight) {
#pragma unroll
  for (int i = 0; i < kPiecesD; ++i) {
#pragma unroll
    for (int j = 0; j < kPiecesP; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) sum[i][j][k] += weight * term[i][j][k];
    }
  }
}

__device__ inline void clear(Tile& tile) {
#pragma unroll
  for (int i = 0; i < kPiecesD; ++i) {
#pragma unroll
    for (int j = 0; j < kPiecesP; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) tile[i][j][k] = 0;
    }
  }
}

// Writes the tile's squared norm. All threads of the block come here; what is in `shared` is read
// before any of them passes the next barrier.
__device__ inline void write_norm(const Tile& tile, float* shared, float* norm) {
  float square = 0;
#pragma unroll
  for (int i = 0; i < kPiecesD; ++i) {
#pragma unroll
    for (int j = 0; j < kPiecesP; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) square += tile[i][j][k] * tile[i][j][k];
    }
  }
  square = sum_warp(square);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = square;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kWarps; ++warp) square += shared[warp];
  *norm = square;
}

// Writes the tile at (d, p) of dw, or adds it to what is there.
__device__ inline void write_tile(const Tile& tile, float* dw, int64_t at_d, int64_t at_p,
                                  int64_t d, int64_t p, bool adds) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kPiecesD; ++i) {
#pragma unroll
    for (int j = 0; j < kPiecesP; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = at_d + warp / kWarpsP * kWarpD + i * 16 + half * 8 + lane / 4;
        const int64_t column = at_p + warp % kWarpsP * kWarpP + j * 8 + lane % 4 * 2;
        if (row >= d) continue;
        float* out = dw + row * p;
        float values[2] = {tile[i][j][2 * half], tile[i][j][2 * half + 1]};
        if (adds && column < p) values[0] += out[column];
        if (adds && column + 1 < p) values[1] += out[column + 1];
        store(out, column, p, values);
      }
    }
  }
}

template <typename T>
struct Given {
  const T *x, *g;
  OuterWalk walk;
  OuterProduct product;
  int64_t tiles_d, tiles_p, splits;
  float* slabs;  // [splits, d, p], or null: dw itself
};

template <typename T, bool kHasOuter>
__global__ void __launch_bounds__(kThreads, 1) outer_wgrad_kernel(const Given<T> given) {
  const OuterWalk& walk = given.walk;
  const OuterProduct& product = given.product;
  T* stages = shared_memory<T>();
  float* of_warps = reinterpret_cast<float*>(stages + kStages * 2 * kOperand);
  const int64_t tiles = given.tiles_d * given.tiles_p;
  const int64_t tile = blockIdx.x % tiles, split = blockIdx.x / tiles;
  const int64_t at_d = tile % given.tiles_d * kTile, at_p = tile / given.tiles_d * kTile;
  const int64_t width_d = (product.d + 7) / 8 * 8, width_p = (product.p + 7) / 8 * 8;
  const int64_t first = first_item(walk, split, given.splits, product.rows);
  const int64_t last = first_item(walk, split + 1, given.splits, product.rows);

  Blocks<kRows> ahead(walk, first, last);
  int64_t fetched = 0;
  const auto fetch_next = [&] {
    if (ahead.exists()) {
      T* stage = stages + fetched % kStages * 2 * kOperand;
      fetch(stage, given.g, product.g_stride, ahead.row, ahead.end, at_d, width_d);
      fetch(stage + kOperand, given.x, product.x_stride, ahead.row, ahead.end, at_p, width_p);
      ahead.advance();
    }
    ++fetched;
    commit_copies();
  };
  for (int i = 0; i < kStages - 1; ++i) fetch_next();

  Tile inner, outer;  // without an outer sum, the second is the total
  clear(inner);
  clear(outer);
  float* dw = given.slabs ? given.slabs + split * product.d * product.p : product.dw;
  bool is_written = false;
  int64_t step = 0;
  for (Blocks<kRows> block(walk, first, last); block.exists(); block.advance(), ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();  // the step's rows are there, and nobody reads the last one's any more
    fetch_next();
    const T* stage = stages + step % kStages * 2 * kOperand;
    multiply(inner, stage, stage + kOperand);
    if (!block.ends_item()) continue;

    const int64_t item = block.item, column = walk.inner_column[item];
    if (column < 0) continue;
    write_norm(inner, of_warps, product.norms + column * tiles + tile);
    add(outer, inner, !kHasOuter && walk.weight ? walk.weight[item] : 1.0f);
    clear(inner);
    if (!kHasOuter) continue;
    const int64_t outer_column = walk.outer_column[item];
    if (outer_column < 0) continue;
    write_norm(outer, of_warps, product.norms + outer_column * tiles + tile);
    if (dw) {
      const int64_t output = walk.output ? walk.output[item] : 0;
      write_tile(outer, dw + output * product.d * product.p, at_d, at_p, product.d, product.p,
                 is_written && !walk.output);
    }
    is_written = true;
    clear(outer);
  }
  if (dw && !walk.output && !(kHasOuter && is_written)) {
    write_tile(outer, dw, at_d, at_p, product.d, product.p, false);
  }
}

}  // namespace

template <typename T>
void outer_wgrad_ampere(const T* x, const T* g, const OuterWalk& walk, const OuterProduct& product,
                        int64_t units, int64_t multiprocessors, float* workspace, void* stream) {
  const auto plan = plan_outer(OuterKernel::kAmpere, walk, product, units, multiprocessors);
  const Given<T> given = {x,
                          g,
                          walk,
                          product,
                          plan.tiles_d,
                          plan.tiles_p,
                          plan.splits,
                          plan.workspace ? workspace : nullptr};
  auto* kernel = walk.outer_column ? &outer_wgrad_kernel<T, true> : &outer_wgrad_kernel<T, false>;
  launch("outer_wgrad", kernel, plan.tiles_d * plan.tiles_p * plan.splits, dim3(kThreads),
         kSharedBytes, stream, given);
  if (plan.workspace) sum_slabs(workspace, plan.splits, product, stream);
}

template void outer_wgrad_ampere<Half>(const Half*, const Half*, const OuterWalk&,
                                       const OuterProduct&, int64_t, int64_t, float*, void*);
template void outer_wgrad_ampere<BFloat16>(const BFloat16*, const BFloat16*, const OuterWalk&,
                                           const OuterProduct&, int64_t, int64_t, float*, void*);

#ifndef GRADNORM_WITH_CUTLASS  // else it is outer_wgrad_hopper.cu's
template <typename T>
void outer_wgrad_hopper(OuterKernel, const T*, const T*, const OuterWalk&, const OuterProduct&,
                        int64_t, int64_t, float*, void*) {
  throw std::runtime_error("outer_wgrad: built without CUTLASS, hence without the Hopper kernel");
}

template void outer_wgrad_hopper<Half>(OuterKernel, const Half*, const Half*, const OuterWalk&,
                                       const OuterProduct&, int64_t, int64_t, float*, void*);
template void outer_wgrad_hopper<BFloat16>(OuterKernel, const BFloat16*, const BFloat16*,
                                           const OuterWalk&, const OuterProduct&, int64_t, int64_t,
                                           float*, void*);
#endif

}  // namespace gradnorm
