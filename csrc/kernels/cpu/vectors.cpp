// Compiled once per instruction set and chosen when the library is loaded, so that one wheel runs
// everywhere and still uses AVX-512: plain SSE2 would make the passes of outer_wgrad cost as much
// as half of its matrix products.
#include "kernels/cpu/vectors.h"

#include <cmath>
#include <cstring>
#include <limits>

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

// exp(x) = 2^n e^r with n a whole number and |r| <= ln(2) / 2, e^r by its Taylor series: the first
// term left out is below half a rounding.
template <typename T>
struct Exp;

template <>
struct Exp<float> {
  typedef int32_t Bits __attribute__((vector_size(64)));
  static constexpr int kTerms = 8, kMantissa = 23, kBias = 127;
  static constexpr float kLow = -87.0f;                         // below it e^x is no normal number
  static constexpr float kRound = 12582912.0f;                  // 1.5 * 2^23: adding it rounds
  static constexpr float kLn2High = 0.693359375f;               // so short that n times it is exact
  static constexpr float kLn2Low = -2.1219444005469058277e-4f;  // ln(2) - kLn2High
};

template <>
struct Exp<double> {
  typedef int64_t Bits __attribute__((vector_size(64)));
  static constexpr int kTerms = 14, kMantissa = 52, kBias = 1023;
  static constexpr double kLow = -708.0;
  static constexpr double kRound = 6755399441055744.0;         // 1.5 * 2^52
  static constexpr double kLn2High = 0.693147182464599609375;  // ln(2) rounded to a float
  static constexpr double kLn2Low = -1.9046542999577680e-9;
};

template <typename T>
GRADNORM_INLINE void exp_lanes(typename Lanes<T>::Vector* lanes) {
  using V = typename Lanes<T>::Vector;
  using E = Exp<T>;
  const V zero = {}, x = *lanes;
  const V clamped = x < E::kLow ? zero + E::kLow : x;  // keeps NaN
  const V shifted = clamped * T(1.44269504088896340736) + E::kRound;
  const V n = shifted - E::kRound;
  const V r = (clamped - n * E::kLn2High) - n * E::kLn2Low;
  V series = zero + T(1);
  for (int k = E::kTerms - 1; k > 0; --k) series = T(1) + series * r * T(1.0 / k);
  typename E::Bits exponent;  // n + bias, where NaN gives anything: it stays in the series
  std::memcpy(&exponent, &shifted, sizeof exponent);
  exponent = (exponent + E::kBias) << E::kMantissa;
  V power;
  std::memcpy(&power, &exponent, sizeof power);
  *lanes = x < E::kLow ? zero : series * power;
}

template <bool kStore, typename T>
GRADNORM_INLINE ExpSums exp_pass(const T* x, T top, T* to, int64_t n) {
  using V = typename Lanes<T>::Vector;
  using W = typename Lanes<T>::Wide;
  constexpr int64_t kStep = Lanes<T>::kCount;
  W sum = {}, squares = {};
  int64_t i = 0;
  while (i < n) {
    const int64_t end = n < i + kRun ? n : i + kRun;
    V run_sum = {}, run_squares = {};
    for (; i + kStep <= end; i += kStep) {
      V e;
      load(x + i, &e);
      e -= top;
      exp_lanes<T>(&e);
      run_sum += e;
      run_squares += e * e;
      if (kStore) std::memcpy(to + i, &e, sizeof e);
    }
    if (i < end) {  // the last few, with nothing behind them
      T few[kStep];
      for (int64_t k = 0; k < kStep; ++k) few[k] = -std::numeric_limits<T>::infinity();
      std::memcpy(few, x + i, sizeof(T) * (end - i));
      V e;
      load(few, &e);
      e -= top;
      exp_lanes<T>(&e);
      run_sum += e;
      run_squares += e * e;
      if (kStore) std::memcpy(to + i, &e, sizeof(T) * (end - i));
      i = end;
    }
    sum += __builtin_convertvector(run_sum, W);
    squares += __builtin_convertvector(run_squares, W);
  }
  ExpSums total = {0, 0};
  for (int64_t k = 0; k < kStep; ++k) {
    total.sum += sum[k];
    total.squares += squares[k];
  }
  return total;
}

template <typename T>
GRADNORM_INLINE T largest_lanes(const T* x, int64_t n) {
  using V = typename Lanes<T>::Vector;
  constexpr int64_t kStep = Lanes<T>::kCount;
  T top = -std::numeric_limits<T>::infinity();
  V lanes[4];
  for (V& lane : lanes) lane = V{} + top;
  int64_t i = 0;
  for (; i + 4 * kStep <= n; i += 4 * kStep) {
    for (int k = 0; k < 4; ++k) {
      V u;
      load(x + i + k * kStep, &u);
      lanes[k] = u > lanes[k] ? u : lanes[k];
    }
  }
  for (; i < n; ++i) top = x[i] > top ? x[i] : top;
  for (const V& lane : lanes) {
    for (int64_t k = 0; k < kStep; ++k) top = lane[k] > top ? lane[k] : top;
  }
  return top;
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

GRADNORM_MULTIVERSION float largest(const float* x, int64_t n) { return largest_lanes(x, n); }

GRADNORM_MULTIVERSION double largest(const double* x, int64_t n) { return largest_lanes(x, n); }

GRADNORM_MULTIVERSION ExpSums exp_sums(const float* x, float top, int64_t n) {
  return exp_pass<false, float>(x, top, nullptr, n);
}

GRADNORM_MULTIVERSION ExpSums exp_sums(const double* x, double top, int64_t n) {
  return exp_pass<false, double>(x, top, nullptr, n);
}

GRADNORM_MULTIVERSION ExpSums exp_into(const float* x, float top, float* to, int64_t n) {
  return exp_pass<true>(x, top, to, n);
}

GRADNORM_MULTIVERSION ExpSums exp_into(const double* x, double top, double* to, int64_t n) {
  return exp_pass<true>(x, top, to, n);
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
