// Compiled once per instruction set and chosen when the library is loaded, so that one wheel runs
// everywhere and still uses AVX-512: plain SSE2 would make the passes of outer_wgrad cost as much
// as half of its matrix products.
#include "kernels/cpu/vectors.h"

#include <cstring>

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define GRADNORM_MULTIVERSION \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define GRADNORM_MULTIVERSION
#endif
#define GRADNORM_INLINE __attribute__((always_inline)) inline

namespace gradnorm {
namespace {

// GCC's vector types become whatever registers the instruction set has.
template <typename T>
struct Lanes {
  static constexpr int64_t kCount = 64 / sizeof(T);
  typedef T Vector __attribute__((vector_size(64)));
  typedef double Wide __attribute__((vector_size(kCount * sizeof(double))));
};

// Floats are summed in runs this long, each of whose lanes adds up to 32 terms, and then in double.
constexpr int64_t kRun = 2048;

template <typename T>
GRADNORM_INLINE void load(const T* from, typename Lanes<T>::Vector* to) {
  std::memcpy(to, from, sizeof *to);
}

// Four sums at a time hide the latency of the addition.
template <typename T>
GRADNORM_INLINE double dot_lanes(const T* a, const T* b, int64_t n) {
  using V = typename Lanes<T>::Vector;
  using W = typename Lanes<T>::Wide;
  constexpr int64_t kStep = Lanes<T>::kCount;
  W wide = {};
  int64_t i = 0;
  while (i + kStep <= n) {
    const int64_t end = n < i + kRun ? n : i + kRun;
    V lanes[4] = {};
    const auto step = [&](int k) __attribute__((always_inline)) {
      V u, v;
      load(a + i + k * kStep, &u);
      load(b + i + k * kStep, &v);
      lanes[k] += u * v;
    };
    for (; i + 4 * kStep <= end; i += 4 * kStep) {
      for (int k = 0; k < 4; ++k) step(k);
    }
    for (; i + kStep <= end; i += kStep) step(0);
    for (int k = 0; k < 4; ++k) wide += __builtin_convertvector(lanes[k], W);
  }
  double total = 0;
  for (; i < n; ++i) total += double(a[i]) * double(b[i]);
  for (int64_t k = 0; k < kStep; ++k) total += wide[k];
  return total;
}

enum class Pass { kSquare, kOverwrite, kAdd };

// The lanes are added up once a row and their sum is taken at the end: done at every row, that
// alone would take as long as the pass.
template <Pass kPass, typename T>
GRADNORM_INLINE double fold_lanes(Tile<T> from, T scale, Tile<T> to, int64_t rows,
                                  int64_t columns) {
  using V = typename Lanes<T>::Vector;
  using W = typename Lanes<T>::Wide;
  constexpr int64_t kStep = Lanes<T>::kCount;
  W wide = {};
  double total = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const T* source = from.data + row * from.stride;
    T* target = to.data + row * to.stride;
    V lanes[4] = {};
    int64_t i = 0;
    const auto step = [&](int k) __attribute__((always_inline)) {
      V u, v = {};
      load(source + i + k * kStep, &u);
      lanes[k] += u * u;
      if (kPass == Pass::kSquare) return;
      if (kPass == Pass::kAdd) load(target + i + k * kStep, &v);
      v += u * scale;
      std::memcpy(target + i + k * kStep, &v, sizeof v);
    };
    for (; i + 4 * kStep <= columns; i += 4 * kStep) {
      for (int k = 0; k < 4; ++k) step(k);
    }
    for (; i + kStep <= columns; i += kStep) step(0);
    wide += __builtin_convertvector((lanes[0] + lanes[1]) + (lanes[2] + lanes[3]), W);
    for (; i < columns; ++i) {
      total += double(source[i]) * double(source[i]);
      if (kPass == Pass::kOverwrite) target[i] = scale * source[i];
      if (kPass == Pass::kAdd) target[i] += scale * source[i];
    }
  }
  for (int64_t k = 0; k < kStep; ++k) total += wide[k];
  return total;
}

template <typename T>
GRADNORM_INLINE double fold_tile(Tile<T> from, T scale, bool overwrite, Tile<T> to, int64_t rows,
                                 int64_t columns) {
  return overwrite ? fold_lanes<Pass::kOverwrite>(from, scale, to, rows, columns)
                   : fold_lanes<Pass::kAdd>(from, scale, to, rows, columns);
}

}  // namespace

GRADNORM_MULTIVERSION double dot(const float* a, const float* b, int64_t n) {
  return dot_lanes(a, b, n);
}

GRADNORM_MULTIVERSION double dot(const double* a, const double* b, int64_t n) {
  return dot_lanes(a, b, n);
}

GRADNORM_MULTIVERSION void add(const float* from, float scale, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += scale * from[i];
}

GRADNORM_MULTIVERSION void add(const double* from, double scale, double* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += scale * from[i];
}

GRADNORM_MULTIVERSION double sqnorm(Tile<float> from, int64_t rows, int64_t columns) {
  return fold_lanes<Pass::kSquare>(from, 1.0f, {nullptr, 0}, rows, columns);
}

GRADNORM_MULTIVERSION double sqnorm(Tile<double> from, int64_t rows, int64_t columns) {
  return fold_lanes<Pass::kSquare>(from, 1.0, {nullptr, 0}, rows, columns);
}

GRADNORM_MULTIVERSION double fold(Tile<float> from, float scale, bool overwrite, Tile<float> to,
                                  int64_t rows, int64_t columns) {
  return fold_tile(from, scale, overwrite, to, rows, columns);
}

GRADNORM_MULTIVERSION double fold(Tile<double> from, double scale, bool overwrite, Tile<double> to,
                                  int64_t rows, int64_t columns) {
  return fold_tile(from, scale, overwrite, to, rows, columns);
}

GRADNORM_MULTIVERSION void add_product(const float* g, const float* x, float shift, float scale,
                                       float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += g[i] * ((x[i] - shift) * scale);
}

GRADNORM_MULTIVERSION void add_product(const double* g, const double* x, double shift, double scale,
                                       double* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += g[i] * ((x[i] - shift) * scale);
}

}  // namespace gradnorm
