// per_sample_wgrad_cpu against sums written out in double.
#include "check.h"
#include "groups.h"
#include "kernels/per_sample_wgrad.h"

namespace {

template <typename T>
void test(const check::Case& one, int64_t width) {
  check::Grouped grouped = one.grouped;
  if (!grouped.outputs.empty()) return;  // there is one output
  const gradnorm::Segments segments = grouped.segments();
  const auto sums = check::random_rows<T>(segments.count * width, 1);
  const std::vector<T> weights(grouped.weights.begin(), grouped.weights.end());
  const T* weight = weights.empty() ? nullptr : weights.data();
  const T nan = std::numeric_limits<T>::quiet_NaN();
  std::vector<T> dw(width, nan), sqnorm(grouped.column_count, nan), alone = sqnorm;
  const auto host = check::naive_host<T>();
  gradnorm::per_sample_wgrad_cpu(sums.data(), width, segments, weight, dw.data(), sqnorm.data(),
                                 grouped.column_count, host);
  gradnorm::per_sample_wgrad_cpu<T>(sums.data(), width, segments, weight, nullptr, alone.data(),
                                    grouped.column_count, host);

  std::vector<double> expected_dw, expected;
  const auto gradient = [&](int64_t s) {
    return std::vector<double>(sums.begin() + s * width, sums.begin() + (s + 1) * width);
  };
  grouped.expect(width, gradient, true, &expected_dw, &expected);
  check::close(std::string(one.what) + ": dw", dw, expected_dw, 16);
  check::close(std::string(one.what) + ": sqnorm", sqnorm, expected, 16);
  check::close(std::string(one.what) + ": sqnorm without dw", alone, expected, 16);
}

template <typename T>
void test_all() {
  for (const check::Case& one : check::cases()) {
    test<T>(one, 5);
    test<T>(one, 700);
  }
}

}  // namespace

int main() {
  test_all<float>();
  test_all<double>();
  return check::failures != 0;
}
