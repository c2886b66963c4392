// segment_sum_cpu against a loop in double.
#include "check.h"
#include "kernels/segment_sum.h"

namespace {

template <typename T>
void test(const std::string& what, const std::vector<int64_t>& offsets, int64_t width) {
  const int64_t segments = static_cast<int64_t>(offsets.size()) - 1, rows = offsets.back();
  const int64_t stride = width + 3;
  const auto g = check::random_rows<T>(rows * stride, 1);
  std::vector<T> out(segments * width, std::numeric_limits<T>::quiet_NaN());
  gradnorm::segment_sum_cpu(g.data(), stride, width, offsets.data(), segments, out.data(),
                            check::naive_host<T>());

  std::vector<double> expected(segments * width);
  for (int64_t s = 0; s < segments; ++s) {
    for (int64_t r = offsets[s]; r < offsets[s + 1]; ++r) {
      for (int64_t i = 0; i < width; ++i) expected[s * width + i] += double(g[r * stride + i]);
    }
  }
  check::close(what, out, expected, 64);  // runs of 64 rows are added up in T
}

template <typename T>
void test_all() {
  test<T>("one row", {0, 1}, 5);
  test<T>("no segments", {0}, 5);
  test<T>("ragged segments, one of them empty", {0, 7, 7, 70, 1070}, 300);
}

}  // namespace

int main() {
  test_all<float>();
  test_all<double>();
  return check::failures != 0;
}
