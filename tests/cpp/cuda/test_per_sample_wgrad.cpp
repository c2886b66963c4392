// per_sample_wgrad_cuda on the CPU, against sums written out in double.
#include "../groups.h"
#include "emulated.h"
#include "kernels/cuda/per_sample_wgrad.cu"

namespace {

template <typename T>
void test(const check::Case& one, int64_t width) {
  check::Grouped grouped = one.grouped;
  if (!grouped.outputs.empty()) return;  // there is one output
  const gradnorm::Segments segments = grouped.segments();
  const check::Fenced<T> sums(segments.count * width);
  check::fill(sums, 1);
  const check::Fenced<T> weights(std::vector<T>(grouped.weights.begin(), grouped.weights.end()));
  const T* weight = weights.size() ? weights.data() : nullptr;
  const int64_t columns = grouped.column_count;
  const std::string what = std::string(one.what) + ", " + std::to_string(width);

  const std::function<std::vector<T>()> run = [&] {
    const check::Fenced<T> out(columns + width), alone(columns);
    std::fill_n(out.data(), columns, T(0)), std::fill_n(alone.data(), columns, T(0));
    const check::Fenced<T> workspace(
        gradnorm::per_sample_wgrad_workspace(sums.data(), width, segments, columns, true));
    gradnorm::per_sample_wgrad_cuda(sums.data(), width, segments, weight, out.data() + columns,
                                    out.data(), columns, workspace.data(), nullptr);
    gradnorm::per_sample_wgrad_cuda<T>(sums.data(), width, segments, weight, nullptr, alone.data(),
                                       columns, workspace.data(), nullptr);
    check::failures += std::memcmp(out.data(), alone.data(), columns * sizeof(T)) != 0;
    return out.values();
  };
  const std::vector<T> found = check::in_every_order(what, run);

  std::vector<double> expected_dw, expected;
  const auto gradient = [&](int64_t s) {
    return std::vector<double>(sums.data() + s * width, sums.data() + (s + 1) * width);
  };
  grouped.expect(width, gradient, true, &expected_dw, &expected);
  check::close(what + ": dw", std::vector<T>(found.begin() + columns, found.end()), expected_dw,
               16);
  check::close(what + ": sqnorm", std::vector<T>(found.begin(), found.begin() + columns), expected,
               16);
}

// Segments in three groups; where there are enough of them, a block goes through several stretches.
check::Case many(int64_t count) {
  check::Grouped grouped;
  grouped.levels = {{}};
  for (int64_t s = 0; s < count; ++s) {
    grouped.lengths.push_back(1);
    grouped.weights.push_back(0.25 * double(s % 7));
    grouped.levels[0].push_back(s % 3);
  }
  return {"many segments in 3 groups", grouped};
}

template <typename T>
void test_all() {
  for (const check::Case& one : check::cases()) {
    for (const int64_t width : {1, 5, 128, 700}) test<T>(one, width);
  }
  test<T>(many(40), 260);
}

}  // namespace

int main() {
  test_all<float>();
  test_all<double>();
  test<float>(many(2112), 260);
  return check::failures != 0;
}
