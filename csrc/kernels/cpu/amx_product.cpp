// A float32 is the sum of three bfloat16, of 8 digits each: high + middle + low. Of the nine
// products of two such sums the six largest are formed; the others are below a float32's own
// rounding. The unit adds them in float32. Where all numbers are bfloat16 anyway, one product is
// all.
//
// Rows are packed first, as tiles of 16 x 64 bytes: in a tile of x, row r of 16 columns lies
// pairwise beside row r + 16; a tile of g is that transposed, as the unit wants its left side.
// Blocks of 2 x 2 tiles of dw are multiplied in the unit's registers and stored to L1. While the
// unit works the rest of the core has nothing to do: between its instructions the block before is
// squared and added where it belongs, and the next columns of x are packed.
#include "kernels/cpu/amx_product.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#define GRADNORM_AMX __attribute__((target("arch=x86-64-v4,amx-tile,amx-bf16")))
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of GCC 12's own intrinsics
#define GRADNORM_AMX_INLINE GRADNORM_AMX __attribute__((always_inline)) inline

namespace gradnorm {
namespace {

constexpr int kSide = 16, kBlock = 2 * kSide;  // of a tile and of a block of dw
constexpr int kDeep = 32;                      // rows of a tile of bfloat16: a step
constexpr int kParts = 3;                      // high, middle, low
constexpr int kTile = 1024;                    // bytes
constexpr int kStep = 2 * kParts * kTile;      // of a block of columns: [part][half]
constexpr int64_t kChunk = 4;                  // steps at once: those of x fill half of L1

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// What the bits of the numbers packed so far say.
struct Seen {
  __m512i high = {}, rest = {};  // the largest high part, by magnitude; all bits of other parts

  GRADNORM_AMX_INLINE bool beyond() const {  // a high part is infinite or NaN
    return _mm512_cmpge_epu16_mask(high, _mm512_set1_epi16(0x7f80)) != 0;
  }
  GRADNORM_AMX_INLINE bool single() const {  // there is nothing but high parts
    return _mm512_test_epi32_mask(rest, _mm512_set1_epi32(0x7fff7fff)) == 0;
  }
};

// Sixteen pairs of floats as pairs of bfloat16, one vector a part.
GRADNORM_AMX_INLINE void split(__m512 first, __m512 second, char* to, Seen& seen) {
  const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(int(0xffff0000));
#pragma GCC unroll 3
  for (int part = 0; part < kParts; ++part) {
    const __m512i a = _mm512_add_epi32(_mm512_castps_si512(first), half);
    const __m512i b = _mm512_add_epi32(_mm512_castps_si512(second), half);
    const __m512i high_a = _mm512_and_si512(a, upper), high_b = _mm512_and_si512(b, upper);
    const __m512i pair = _mm512_or_si512(_mm512_srli_epi32(a, 16), high_b);
    _mm512_store_si512(to + part * 2 * kTile, pair);
    first = _mm512_sub_ps(first, _mm512_castsi512_ps(high_a));
    second = _mm512_sub_ps(second, _mm512_castsi512_ps(high_b));
    if (part == 0) {
      const __m512i magnitude = _mm512_and_si512(pair, _mm512_set1_epi32(0x7fff7fff));
      seen.high = _mm512_max_epu16(seen.high, magnitude);
    } else {
      seen.rest = _mm512_or_si512(seen.rest, pair);
    }
  }
}

GRADNORM_AMX_INLINE void transpose(__m512 (&r)[16]) {
  __m512d t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_castps_pd(_mm512_unpacklo_ps(r[i], r[i + 1]));
    t[i + 1] = _mm512_castps_pd(_mm512_unpackhi_ps(r[i], r[i + 1]));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // blocks of 4 x 4 are transposed, each in its quarter
    r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(t[i], t[i + 2]));
    r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(t[i], t[i + 2]));
    r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(t[i + 1], t[i + 3]));
    r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(t[i + 1], t[i + 3]));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // and the quarters change places
    const __m512 even_low = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    const __m512 odd_low = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    const __m512 even_high = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    const __m512 odd_high = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    r[i] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
    r[i + 4] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
    r[i + 12] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
  }
}

GRADNORM_AMX_INLINE __mmask16 first_of(int64_t columns) {
  return __mmask16((1u << std::clamp<int64_t>(columns, 0, kSide)) - 1);
}

// Rows of some columns. Beyond the last row and column there are zeros. The block after this one is
// fetched on the way: what lies a row apart the processor does not foresee.
struct Rows {
  const float* data;
  int64_t stride, columns, rows;

  GRADNORM_AMX_INLINE __m512 load(int64_t row, int64_t column) const {
    if (row >= rows) return __m512{};
    _mm_prefetch(reinterpret_cast<const char*>(data + row * stride + column + kBlock), _MM_HINT_T1);
    return _mm512_maskz_loadu_ps(first_of(columns - column), data + row * stride + column);
  }
};

// A block of columns of x, pair of rows by pair of rows.
struct Packing {
  Rows from;
  char* to;
  int64_t left;  // pairs, of kDeep each step
  Seen seen = {};
  int64_t next = 0;

  GRADNORM_AMX_INLINE void advance(int64_t pairs) {
    for (const int64_t end = std::min(left, next + pairs); next < end; ++next) {
      const int64_t row = next / kDeep * kDeep + next % kSide, column = next & kSide;
      split(from.load(row, column), from.load(row + kSide, column),
            to + next / kDeep * kStep + (column ? kTile : 0) + next % kSide * 64, seen);
    }
  }
};

// All blocks of g, [block][step].
GRADNORM_AMX_INLINE void pack_transposed(const Rows& from, char* to, Seen& seen) {
  for (int64_t column = 0; column < from.columns; column += kBlock) {
    for (int64_t row = 0; row < from.rows; row += kDeep, to += kStep) {
      for (int half = 0; half < 2; ++half) {
        __m512 a[kSide], b[kSide];
        for (int r = 0; r < kSide; ++r) {
          a[r] = from.load(row + r, column + half * kSide);
          b[r] = from.load(row + r + kSide, column + half * kSide);
        }
        transpose(a);
        transpose(b);
        for (int r = 0; r < kSide; ++r) split(a[r], b[r], to + half * kTile + r * 64, seen);
      }
    }
  }
}

// A block of sums: squared, scaled and added, row by row.
struct Folding {
  const float* sums = nullptr;
  Tile<float> to = {};
  int64_t width = 0, left = 0;  // rows
  __m512 squares[2] = {};       // of the block
  __m512d all_squares = {};     // of those before

  // Two rows are read before they are written: where rows are a power of two apart, a processor
  // takes reading the second for reading what was just written of the first, and waits.
  GRADNORM_AMX_INLINE void advance(int64_t rows, float scale, bool overwrite) {
    const __m512 factor = _mm512_set1_ps(scale);
    for (; rows > 0 && left > 0; rows -= 2, left -= 2, sums += 2 * kBlock) {
      __m512 sum[4], before[4] = {};
      __mmask16 masks[4];
      float* at[4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {  // beyond the block's rows and its width sums are zero
        const int row = k / 2, column = k % 2 * kSide;
        sum[k] = _mm512_load_ps(sums + row * kBlock + column);
        squares[k % 2] += sum[k] * sum[k];
        masks[k] = row < left ? first_of(width - column) : __mmask16(0);
        at[k] = to.data + row * to.stride + column;
      }
      if (!to.data) continue;
#pragma GCC unroll 4
      for (int k = 0; k < 4 && !overwrite; ++k) before[k] = _mm512_maskz_loadu_ps(masks[k], at[k]);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        _mm512_mask_storeu_ps(at[k], masks[k], before[k] + factor * sum[k]);
      }
      to.data += 2 * to.stride;
    }
  }

  GRADNORM_AMX_INLINE void finish(float scale, bool overwrite) {
    advance(left, scale, overwrite);
    const __m512 both = squares[0] + squares[1];
    all_squares += _mm512_cvtps_pd(_mm512_castps512_ps256(both));
    all_squares += _mm512_cvtps_pd(_mm512_extractf32x8_ps(both, 1));
    squares[0] = squares[1] = __m512{};
  }

  GRADNORM_AMX double total() const {
    double total = 0;
    for (int k = 0; k < 8; ++k) total += all_squares[k];
    return total;
  }
};

GRADNORM_AMX_INLINE void load_g(const char* g, int part) {
  _tile_loadd(4, g + 2 * part * kTile, 64);
  _tile_loadd(5, g + (2 * part + 1) * kTile, 64);
}

GRADNORM_AMX_INLINE void load_x(const char* x, int part) {
  _tile_loadd(6, x + 2 * part * kTile, 64);
  _tile_loadd(7, x + (2 * part + 1) * kTile, 64);
}

GRADNORM_AMX_INLINE void multiply() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// sums [kBlock, kBlock] = or += g x of so many steps, and between instructions a slice of other
// work; `single`: of the high parts alone.
template <typename Work>
GRADNORM_AMX_INLINE void multiply_block(const char* g, const char* x, int64_t steps, bool single,
                                        bool overwrite, float* sums, const Work& work) {
  constexpr int kStride = kBlock * sizeof(float), kDown = kSide * kBlock;
  if (overwrite) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kStride);
    _tile_loadd(1, sums + kSide, kStride);
    _tile_loadd(2, sums + kDown, kStride);
    _tile_loadd(3, sums + kDown + kSide, kStride);
  }
  for (const char* end = g + steps * kStep; g != end; g += kStep, x += kStep) {
    load_g(g, 0);
    if (!single) {
      load_x(x, 2), multiply(), work();
      load_x(x, 1), multiply(), work();
      load_g(g, 1), multiply(), work();
      load_x(x, 0), multiply(), work();
      load_g(g, 2), multiply(), work();
      load_g(g, 0), multiply(), work();
    } else {
      load_x(x, 0), multiply(), work();
    }
  }
  _tile_stored(0, sums, kStride);
  _tile_stored(1, sums + kSide, kStride);
  _tile_stored(2, sums + kDown, kStride);
  _tile_stored(3, sums + kDown + kSide, kStride);
}

struct alignas(64) Tiles {  // what the unit's registers hold, as it wants to be told
  uint8_t palette = 0, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// The unit is left as it was found: torch's own kernels (oneDNN) use it as well.
class Configured {
 public:
  GRADNORM_AMX Configured() {
    Tiles ours;
    ours.palette = 1;
    for (int i = 0; i < 8; ++i) ours.bytes[i] = kTile / kSide, ours.rows[i] = kSide;
    _tile_storeconfig(&before_);
    _tile_loadconfig(&ours);
  }
  GRADNORM_AMX ~Configured() {
    if (before_.palette == 0) {
      _tile_release();
    } else {
      _tile_loadconfig(&before_);
    }
  }
  Configured(const Configured&) = delete;

 private:
  Tiles before_;
};

}  // namespace

bool has_amx() {
  static const bool found = [] {
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
    __builtin_cpu_init();
    unsigned a = 7, b = 0, c = 0, d = 0;
    if (!__builtin_cpu_supports("x86-64-v4")) return false;  // nor has it that page of cpuid
    __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    const bool bfloat16 = d >> 22 & 1, tiles = d >> 24 & 1;
    return bfloat16 && tiles && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return found;
}

GRADNORM_AMX double amx_product(const FusedRows& all, float scale, bool overwrite, Tile<float> to,
                                std::vector<float>& scratch, FusedProduct* otherwise) {
  constexpr int64_t kArea = kBlock * kBlock;
  const int64_t down = divide_up(all.height, kBlock), across = divide_up(all.width, kBlock);
  const int64_t most = std::min(kChunk, divide_up(all.rows, kDeep));  // steps
  const bool chunks = all.rows > kChunk * kDeep;
  const int64_t buffers = chunks ? down * across : 2;  // of sums
  const size_t size = buffers * kArea + (down + 2) * most * kStep / sizeof(float) + 16;
  if (scratch.size() < size) scratch.resize(size);
  float* sums = scratch.data();
  while (reinterpret_cast<uintptr_t>(sums) % 64 != 0) ++sums;
  char* x = reinterpret_cast<char*>(sums + buffers * kArea);
  char* g = x + 2 * most * kStep;

  std::vector<bool> beyond(across);  // which columns of x
  Folding folding;
  const Configured configured;
  for (int64_t row = 0; row < all.rows; row += kChunk * kDeep) {
    const int64_t rows = std::min(kChunk * kDeep, all.rows - row), steps = divide_up(rows, kDeep);
    const bool first = row == 0, last = row + rows == all.rows;
    Seen of_g;
    pack_transposed({all.g + row * all.g_stride, all.g_stride, all.height, rows}, g, of_g);
    if (of_g.beyond()) {
      std::vector<float> own;
      return otherwise(all, scale, overwrite, to, own);
    }
    const auto packing_of = [&](int64_t j) {
      const Rows from = {all.x + row * all.x_stride + j * kBlock, all.x_stride,
                         all.width - j * kBlock, rows};
      return Packing{from, x + j % 2 * most * kStep, j < across ? steps * kDeep : 0};
    };
    Packing packed, packing = packing_of(0);
    for (int64_t j = 0; j < across; ++j) {
      packing.advance(packing.left);
      packed = std::exchange(packing, packing_of(j + 1));
      if (packed.seen.beyond()) beyond[j] = true;
      const bool single = of_g.single() && packed.seen.single();
      const int64_t slices = steps * (single ? 1 : 6);
      const int64_t some_rows = divide_up(kBlock, slices);
      const int64_t some_pairs = divide_up(packing.left, down * slices);
      for (int64_t i = 0; i < down && !beyond[j]; ++i) {
        float* of_block = sums + (chunks ? j * down + i : i % 2) * kArea;
        multiply_block(g + i * steps * kStep, packed.to, steps, single, first, of_block,
                       [&]() GRADNORM_AMX {
                         folding.advance(some_rows, scale, overwrite);
                         packing.advance(some_pairs);
                       });
        folding.finish(scale, overwrite);
        if (!last) continue;
        folding.sums = of_block;
        folding.width = std::min<int64_t>(kBlock, all.width - j * kBlock);
        folding.left = std::min<int64_t>(kBlock, all.height - i * kBlock);
        folding.to = {to.data ? to.data + i * kBlock * to.stride + j * kBlock : nullptr, to.stride};
      }
    }
  }
  folding.finish(scale, overwrite);
  double squares = folding.total();
  for (int64_t j = 0; j < across; ++j) {
    if (!beyond[j]) continue;
    std::vector<float> own;
    FusedRows part = all;
    part.x += j * kBlock;
    part.width = std::min<int64_t>(kBlock, all.width - j * kBlock);
    squares += otherwise(part, scale, overwrite,
                         {to.data ? to.data + j * kBlock : nullptr, to.stride}, own);
  }
  return squares;
}

}  // namespace gradnorm
#else
namespace gradnorm {
bool has_amx() { return false; }
double amx_product(const FusedRows& rows, float scale, bool overwrite, Tile<float> to,
                   std::vector<float>& scratch, FusedProduct* otherwise) {
  return otherwise(rows, scale, overwrite, to, scratch);
}
}  // namespace gradnorm
#endif
