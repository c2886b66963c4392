// outer_wgrad_cpu against each segment's gradient written out in double.
#include "check.h"
#include "groups.h"
#include "kernels/outer_wgrad.h"

namespace {

template <typename T>
void test(const check::Case& one, int64_t p, int64_t d, bool segment_norms, int64_t threads) {
  check::Grouped grouped = one.grouped;
  const gradnorm::Segments segments = grouped.segments();
  const int64_t rows = grouped.offsets.back(), x_stride = p + 3, g_stride = d + 1;
  const auto x = check::random_rows<T>(rows * x_stride, 1),
             g = check::random_rows<T>(rows * g_stride, 2);
  const std::vector<T> weights(grouped.weights.begin(), grouped.weights.end());
  const T* weight = weights.empty() ? nullptr : weights.data();
  // The kernel overwrites dw, unless nothing adds to it.
  const T before = rows ? std::numeric_limits<T>::quiet_NaN() : T(0);
  std::vector<T> dw(grouped.output_count * d * p, before);
  std::vector<T> sqnorm(grouped.column_count), alone(grouped.column_count);
  const auto host = check::naive_host<T>(threads);
  gradnorm::outer_wgrad_cpu(x.data(), x_stride, g.data(), g_stride, p, d, segments, weight,
                            dw.data(), sqnorm.data(), segment_norms, host);
  gradnorm::outer_wgrad_cpu<T>(x.data(), x_stride, g.data(), g_stride, p, d, segments, weight,
                               nullptr, alone.data(), segment_norms, host);

  std::vector<double> expected_dw, expected;
  const auto gradient = [&](int64_t s) {
    std::vector<double> of_segment(d * p);
    for (int64_t r = grouped.offsets[s]; r < grouped.offsets[s + 1]; ++r) {
      for (int64_t i = 0; i < d; ++i) {
        for (int64_t j = 0; j < p; ++j) {
          of_segment[i * p + j] += double(g[r * g_stride + i]) * double(x[r * x_stride + j]);
        }
      }
    }
    return of_segment;
  };
  grouped.expect(d * p, gradient, segment_norms, &expected_dw, &expected);
  const std::string what = std::string(one.what) + (segment_norms ? "" : ", groups only") + " [" +
                           std::to_string(d) + ", " + std::to_string(p) + "]";
  check::close(what + ": dw", dw, expected_dw, 16);
  check::close(what + ": sqnorm", sqnorm, expected, 16);
  check::close(what + ": sqnorm without dw", alone, expected, 16);
}

template <typename T>
void test_all() {
  for (const check::Case& one : check::cases()) {
    for (const bool segment_norms : {true, false}) test<T>(one, 17, 5, segment_norms, 1);
  }
  test<T>(check::cases()[4], 530, 140, true, 2);  // several tiles, the last of them narrower
  test<T>(check::cases()[7], 3, 600, true, 3);
}

}  // namespace

int main() {
  test_all<float>();
  test_all<double>();
  return check::failures != 0;
}
