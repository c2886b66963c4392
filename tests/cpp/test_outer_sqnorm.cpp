// outer_sqnorm_cpu against each segment's gradient written out in double.
#include "check.h"
#include "kernels/outer_sqnorm.h"

namespace {

template <typename T>
void test(const std::string& what, const std::vector<int64_t>& offsets, int64_t p, int64_t d) {
  const int64_t segments = static_cast<int64_t>(offsets.size()) - 1, rows = offsets.back();
  const int64_t x_stride = p + 3, g_stride = d + 1;
  const auto x = check::random_rows<T>(rows * x_stride, 1),
             g = check::random_rows<T>(rows * g_stride, 2);
  std::vector<T> sqnorm(segments, std::numeric_limits<T>::quiet_NaN());
  gradnorm::outer_sqnorm_cpu(x.data(), x_stride, g.data(), g_stride, p, d, offsets.data(), segments,
                             sqnorm.data(), check::naive_host<T>());

  std::vector<double> expected(segments);
  for (int64_t s = 0; s < segments; ++s) {
    for (int64_t i = 0; i < d; ++i) {
      for (int64_t j = 0; j < p; ++j) {
        double entry = 0;
        for (int64_t r = offsets[s]; r < offsets[s + 1]; ++r) {
          entry += double(g[r * g_stride + i]) * double(x[r * x_stride + j]);
        }
        expected[s] += entry * entry;
      }
    }
  }
  check::close(what, sqnorm, expected, 64);
}

template <typename T>
void test_all() {
  test<T>("one row", {0, 1}, 5, 3);
  test<T>("no segments", {0}, 5, 3);
  test<T>("rows of their own, and an empty segment", {0, 1, 2, 2, 3}, 70, 33);
  test<T>("ragged segments", {0, 7, 70, 1070}, 6, 5);
  test<T>("segments of exactly one and two blocks", {0, 128, 384}, 9, 4);
}

}  // namespace

int main() {
  test_all<float>();
  test_all<double>();
  return check::failures != 0;
}
