// A piece of the tile is as large as the registers hold: kHeight rows of two vectors. Its rows of g
// and x are copied into panels first, in which they lie one after the other: in place every row
// would be on a page of its own. A panel of x is read from L1 for all panels of g.
#include "kernels/cpu/fused_product.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>

#include "kernels/cpu/amx_product.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define GRADNORM_X86
#define GRADNORM_TARGET(level) __attribute__((target(level)))
#endif
#define GRADNORM_INLINE __attribute__((always_inline)) inline

namespace gradnorm {
namespace {

// How many floats of a tile and its rows L2 has room for, beside what passes through it.
double room() {
  long bytes = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
  bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
  return 0.8 * double(bytes > 0 ? bytes : 1 << 20) / sizeof(float);
}

// A tile and its rows of both sides stay in L2 together: side^2 + 2 rows side = room
int64_t most_width(int64_t rows) {
  const double r = double(rows);
  return std::max<int64_t>(64, static_cast<int64_t>(std::sqrt(r * r + room()) - r));
}

// height width + rows (height + width) = room
int64_t most_height(int64_t width, int64_t rows) {
  const double left = room() - double(rows * width);
  return std::max<int64_t>(64, static_cast<int64_t>(left / double(width + rows)));
}

}  // namespace

#ifdef GRADNORM_X86
namespace {

typedef float Float16 __attribute__((vector_size(64)));
typedef float Float8 __attribute__((vector_size(32)));

template <typename Vector, int kHeight>
struct Piece {
  static constexpr int kLanes = sizeof(Vector) / sizeof(float), kWidth = 2 * kLanes;
  static constexpr int64_t kApart = 64 / sizeof(float);  // panels a power of two apart share sets

  static GRADNORM_INLINE int64_t panel(int64_t rows, int size) { return rows * size + kApart; }

  // `size` columns at a time; zeros after the last.
  template <int kSize>
  static GRADNORM_INLINE void pack(const float* from, int64_t stride, int64_t columns, int64_t rows,
                                   float* to) {
    const int64_t whole = columns / kSize * kSize;
    for (int64_t r = 0; r < rows; ++r, from += stride, to += kSize) {
      float* at = to;
      for (int64_t j = 0; j < whole; j += kSize, at += panel(rows, kSize)) {
        std::memcpy(at, from + j, sizeof(float) * kSize);
      }
      if (whole == columns) continue;
      for (int64_t j = 0; j < kSize; ++j) at[j] = whole + j < columns ? from[whole + j] : 0;
    }
  }

  static GRADNORM_INLINE double product(const float* g, const float* x, int64_t rows, float scale,
                                        bool overwrite, Tile<float> to) {
    Vector sums[kHeight][2] = {};
    if (to.data && !overwrite) {
      for (int i = 0; i < kHeight; ++i) {
        __builtin_prefetch(to.data + i * to.stride, 1);
        __builtin_prefetch(to.data + i * to.stride + kLanes, 1);
      }
    }
    for (int64_t r = 0; r < rows; ++r, g += kHeight, x += kWidth) {
      Vector left, right;
      std::memcpy(&left, x, sizeof left);
      std::memcpy(&right, x + kLanes, sizeof right);
#pragma GCC unroll 12
      for (int i = 0; i < kHeight; ++i) {
        sums[i][0] += g[i] * left;
        sums[i][1] += g[i] * right;
      }
    }
    Vector squares = {};
#pragma GCC unroll 12
    for (int i = 0; i < kHeight; ++i) {
      squares += sums[i][0] * sums[i][0];
      squares += sums[i][1] * sums[i][1];
    }
    if (to.data) {
#pragma GCC unroll 12
      for (int i = 0; i < kHeight; ++i) {
        for (int half = 0; half < 2; ++half) {
          float* at = to.data + i * to.stride + half * kLanes;
          Vector before = {};
          if (!overwrite) std::memcpy(&before, at, sizeof before);
          const Vector after = before + scale * sums[i][half];
          std::memcpy(at, &after, sizeof after);
        }
      }
    }
    double total = 0;
    for (int k = 0; k < kLanes; ++k) total += double(squares[k]);
    return total;
  }

  // A piece at the tile's edge, of which only a part is there.
  static GRADNORM_INLINE double edge(const float* g, const float* x, int64_t rows, float scale,
                                     bool overwrite, Tile<float> to, int64_t height,
                                     int64_t width) {
    alignas(64) float whole[kHeight * kWidth];
    const double squares = product(g, x, rows, scale, true, {whole, kWidth});
    for (int64_t i = 0; to.data && i < height; ++i) {
      for (int64_t j = 0; j < width; ++j) {
        float& at = to.data[i * to.stride + j];
        at = (overwrite ? 0 : at) + whole[i * kWidth + j];
      }
    }
    return squares;
  }

  static GRADNORM_INLINE double run(const FusedRows& all, float scale, bool overwrite,
                                    Tile<float> to, std::vector<float>& scratch) {
    const int64_t rows = all.rows;
    const int64_t of_g = panel(rows, kHeight), of_x = panel(rows, kWidth);
    const int64_t down = (all.height + kHeight - 1) / kHeight;
    const int64_t across = (all.width + kWidth - 1) / kWidth;
    const size_t size = down * of_g + across * of_x + kApart;
    if (scratch.size() < size) scratch.resize(size);
    float* x = scratch.data();
    while (reinterpret_cast<uintptr_t>(x) % 64 != 0) ++x;
    float* g = x + across * of_x;
    pack<kHeight>(all.g, all.g_stride, all.height, rows, g);
    pack<kWidth>(all.x, all.x_stride, all.width, rows, x);
    double squares = 0;
    for (int64_t j = 0; j < across; ++j) {
      for (int64_t i = 0; i < down; ++i) {
        const int64_t height = std::min<int64_t>(kHeight, all.height - i * kHeight);
        const int64_t width = std::min<int64_t>(kWidth, all.width - j * kWidth);
        const Tile<float> piece = {
            to.data ? to.data + i * kHeight * to.stride + j * kWidth : nullptr, to.stride};
        const float *of_i = g + i * of_g, *of_j = x + j * of_x;
        squares += height == kHeight && width == kWidth
                       ? product(of_i, of_j, rows, scale, overwrite, piece)
                       : edge(of_i, of_j, rows, scale, overwrite, piece, height, width);
      }
    }
    return squares;
  }
};

using Avx512 = Piece<Float16, 12>;  // 24 of 32 registers hold sums
using Avx2 = Piece<Float8, 6>;      // 12 of 16

GRADNORM_TARGET("arch=x86-64-v4")
double run_avx512(const FusedRows& rows, float scale, bool overwrite, Tile<float> to,
                  std::vector<float>& scratch) {
  return Avx512::run(rows, scale, overwrite, to, scratch);
}

GRADNORM_TARGET("arch=x86-64-v3")
double run_avx2(const FusedRows& rows, float scale, bool overwrite, Tile<float> to,
                std::vector<float>& scratch) {
  return Avx2::run(rows, scale, overwrite, to, scratch);
}

double run_amx(const FusedRows& rows, float scale, bool overwrite, Tile<float> to,
               std::vector<float>& scratch) {
  constexpr int64_t kHalf = 16;  // of a tile would be empty
  if (rows.rows <= kHalf) return run_avx512(rows, scale, overwrite, to, scratch);
  return amx_product(rows, scale, overwrite, to, scratch, run_avx512);
}

// Measured on 2026-11-21, one thread of a Xeon with 2 MB of L2: of tiles from 256 to 1024 wide and
// 128 to 512 high, for 64 to 512 rows, these are within a tenth of the best.
int64_t most_width_amx(int64_t) { return 1024; }
int64_t most_height_amx(int64_t width, int64_t) { return (256 << 10) / width; }

}  // namespace

const std::vector<FusedKernel>& fused_kernels() {
  static const std::vector<FusedKernel> kernels = [] {
    std::vector<FusedKernel> found;
    __builtin_cpu_init();
    if (has_amx()) {
      found.push_back({"AMX", true, 32, 32, most_width_amx, most_height_amx, run_amx});
    }
    if (__builtin_cpu_supports("x86-64-v4")) {
      found.push_back({"AVX-512", false, 12, Avx512::kWidth, most_width, most_height, run_avx512});
    }
    if (__builtin_cpu_supports("x86-64-v3")) {
      found.push_back({"AVX2", false, 6, Avx2::kWidth, most_width, most_height, run_avx2});
    }
    return found;
  }();
  return kernels;
}
#else
const std::vector<FusedKernel>& fused_kernels() {
  static const std::vector<FusedKernel> none;
  return none;
}
#endif

const FusedKernel* fused_kernel() {
  static const FusedKernel* const chosen = []() -> const FusedKernel* {
    const auto& kernels = fused_kernels();
    const char* named = std::getenv("GRADNORM_CPU_PRODUCT");
    if (named == nullptr) return kernels.empty() ? nullptr : &kernels[0];
    std::string those;
    for (const FusedKernel& kernel : kernels) {
      if (std::string_view(named) == kernel.instructions) return &kernel;
      those += (those.empty() ? "" : ", ") + std::string(kernel.instructions);
    }
    throw std::invalid_argument("GRADNORM_CPU_PRODUCT must be one of this processor's (" +
                                (those.empty() ? "none" : those) + "), got '" + named + "'");
  }();
  return chosen;
}

}  // namespace gradnorm
