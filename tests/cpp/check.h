// What the C++ tests share: a naive host, random rows, and a comparison that says what differed.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels/host.h"

namespace check {

inline int failures = 0;

template <typename T>
gradnorm::Host<T> naive_host(int64_t threads = 1) {
  gradnorm::Host<T> host;
  host.multiply = [](const gradnorm::Matrix<const T>& a, const gradnorm::Matrix<const T>& b,
                     const gradnorm::Matrix<T>& c, double alpha, double beta) {
    for (int64_t i = 0; i < c.rows; ++i) {
      for (int64_t j = 0; j < c.columns; ++j) {
        double sum = 0;
        for (int64_t k = 0; k < a.columns; ++k) {
          sum += double(a.data[i * a.row_stride + k * a.column_stride]) *
                 double(b.data[k * b.row_stride + j * b.column_stride]);
        }
        T& out = c.data[i * c.row_stride + j * c.column_stride];
        out = T(alpha * sum + (beta == 0 ? 0 : beta * double(out)));
      }
    }
  };
  // One range after the other, split in two so that ranges that do not begin at 0 are seen.
  host.parallel_ranges = [](int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
    body(0, count / 2, context);
    body(count / 2, count, context);
  };
  host.threads = threads;
  return host;
}

template <typename T>
std::vector<T> random_rows(int64_t size, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal;
  std::vector<T> values(size);
  for (T& value : values) value = T(normal(generator));
  return values;
}

// Every entry within `terms` roundings of T, relative to the largest: what a sum of that many terms
// may lose.
template <typename T>
void close(const std::string& what, const std::vector<T>& got, const std::vector<double>& expected,
           double terms) {
  double largest = 0, worst = 0;
  bool broken = got.size() != expected.size();
  for (size_t i = 0; i < expected.size() && !broken; ++i) {
    broken = std::isnan(double(got[i])) != std::isnan(expected[i]);
    if (std::isnan(expected[i]) || double(got[i]) == expected[i]) continue;  // equal infinities
    largest = std::fmax(largest, std::fabs(expected[i]));
    worst = std::fmax(worst, std::fabs(double(got[i]) - expected[i]));
  }
  const double allowed = terms * std::numeric_limits<T>::epsilon() * largest;
  const bool ok = !broken && worst <= allowed;
  std::printf("%s: %s (%s), off by %.2g of %.2g\n", ok ? "ok" : "FAIL", what.c_str(),
              std::is_same_v<T, float> ? "float" : "double", worst, allowed);
  failures += !ok;
}

}  // namespace check
