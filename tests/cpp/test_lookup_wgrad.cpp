// lookup_wgrad_cpu against each segment's table written out in double.
#include "check.h"
#include "groups.h"
#include "kernels/lookup_wgrad.h"

namespace {

template <typename T>
void test(const check::Case& one, int64_t vocabulary, int64_t padding_idx) {
  check::Grouped grouped = one.grouped;
  const gradnorm::Segments segments = grouped.segments();
  const int64_t rows = grouped.offsets.back(), d = 19, g_stride = d + 2;
  const auto g = check::random_rows<T>(rows * g_stride, 1);
  std::vector<int64_t> ids(rows);
  std::mt19937 generator(2);
  for (int64_t& id : ids) id = static_cast<int64_t>(generator() % vocabulary);
  const std::vector<T> weights(grouped.weights.begin(), grouped.weights.end());
  const T* weight = weights.empty() ? nullptr : weights.data();
  std::vector<T> dw(grouped.output_count * vocabulary * d);
  std::vector<T> sqnorm(grouped.column_count), alone(grouped.column_count);
  const auto host = check::naive_host<T>();
  gradnorm::lookup_wgrad_cpu(ids.data(), g.data(), g_stride, d, vocabulary, segments, weight,
                             padding_idx, dw.data(), sqnorm.data(), host);
  gradnorm::lookup_wgrad_cpu<T>(ids.data(), g.data(), g_stride, d, vocabulary, segments, weight,
                                padding_idx, nullptr, alone.data(), host);

  std::vector<double> expected_dw, expected;
  const auto gradient = [&](int64_t s) {
    std::vector<double> of_segment(vocabulary * d);
    for (int64_t r = grouped.offsets[s]; r < grouped.offsets[s + 1]; ++r) {
      if (ids[r] == padding_idx) continue;
      for (int64_t i = 0; i < d; ++i) of_segment[ids[r] * d + i] += double(g[r * g_stride + i]);
    }
    return of_segment;
  };
  grouped.expect(vocabulary * d, gradient, true, &expected_dw, &expected);
  const std::string what = std::string(one.what) + (padding_idx < 0 ? "" : ", with padding");
  // A row of the table is a sum of up to a thousand terms in T.
  const double terms = std::is_same_v<T, float> ? 64 : 256;
  check::close(what + ": dw", dw, expected_dw, terms);
  check::close(what + ": sqnorm", sqnorm, expected, terms);
  check::close(what + ": sqnorm without dw", alone, expected, terms);
}

template <typename T>
void test_all() {
  for (const check::Case& one : check::cases()) {
    test<T>(one, 6, -1);
    test<T>(one, 6, 2);
  }
}

}  // namespace

int main() {
  test_all<float>();
  test_all<double>();
  return check::failures != 0;
}
