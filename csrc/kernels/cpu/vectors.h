// The vectorised passes over memory that the CPU kernels share. Nothing here allocates or threads.
#pragma once

#include <cstdint>

namespace gradnorm {

// sum_i a[i] b[i]
double dot(const float* a, const float* b, int64_t n);
double dot(const double* a, const double* b, int64_t n);

// to[i] += scale from[i]
void add(const float* from, float scale, float* to, int64_t n);
void add(const double* from, double scale, double* to, int64_t n);

// A matrix of rows side by side, inner stride 1.
template <typename T>
struct Tile {
  T* data;
  int64_t stride;
};

// sum_ij from[i, j]^2 over [rows, columns]
double sqnorm(Tile<float> from, int64_t rows, int64_t columns);
double sqnorm(Tile<double> from, int64_t rows, int64_t columns);

// sqnorm(from), and on the way to[i, j] = scale from[i, j], or += where it does not overwrite
double fold(Tile<float> from, float scale, bool overwrite, Tile<float> to, int64_t rows,
            int64_t columns);
double fold(Tile<double> from, double scale, bool overwrite, Tile<double> to, int64_t rows,
            int64_t columns);

// to[i] += g[i] (x[i] - shift) scale
void add_product(const float* g, const float* x, float shift, float scale, float* to, int64_t n);
void add_product(const double* g, const double* x, double shift, double scale, double* to,
                 int64_t n);

// The largest of x[0], ..., x[n - 1]; NaN may be missed. -infinity where n is 0.
float largest(const float* x, int64_t n);
double largest(const double* x, int64_t n);

struct ExpSums {
  double sum, squares;
};

// sum_i exp(x[i] - top) and sum_i exp(x[i] - top)^2, for x[i] <= top; NaN where any x[i] is. Exact
// to a rounding or two of T; what is below its smallest normal number counts as 0.
ExpSums exp_sums(const float* x, float top, int64_t n);
ExpSums exp_sums(const double* x, double top, int64_t n);

// exp_sums, and on the way to[i] = exp(x[i] - top)
ExpSums exp_into(const float* x, float top, float* to, int64_t n);
ExpSums exp_into(const double* x, double top, double* to, int64_t n);

constexpr int64_t kColumns = 256;  // a block of columns whose sums stay in L1

// Sums of the columns of a block: rows are added to `run`, and every 64 rows the run to the total.
template <typename T>
struct ColumnSums {
  T run[kColumns] = {};
  double total[kColumns] = {};
  int rows = 0;

  void end_row() {
    if (++rows == 64) end_run();
  }

  void end_run() {
    for (int64_t i = 0; i < kColumns; ++i) total[i] += double(run[i]);
    for (int64_t i = 0; i < kColumns; ++i) run[i] = 0;
    rows = 0;
  }

  void write(T* out, int64_t columns) {
    end_run();
    for (int64_t i = 0; i < columns; ++i) out[i] = T(total[i]);
  }
};

}  // namespace gradnorm
