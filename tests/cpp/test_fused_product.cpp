// The fused products of this processor's instruction sets against sums in double.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

#include "check.h"
#include "kernels/cpu/fused_product.h"

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kLargest = std::numeric_limits<float>::max();

// In place of some random numbers: others.
struct Entry {
  bool of_g;
  int64_t row, column;
  float value;
};

// `digits`: of the random numbers, binary.
void test(const gradnorm::FusedKernel& kernel, int64_t rows, int64_t height, int64_t width,
          bool overwrite, const std::vector<Entry>& entries = {}, int digits = 24) {
  const int64_t g_stride = height + 3, x_stride = width + 5, stride = width + 2;
  auto g = check::random_rows<float>(rows * g_stride, 1),
       x = check::random_rows<float>(rows * x_stride, 2);
  for (auto* all : {&g, &x}) {
    for (float& value : *all) {
      int exponent;
      const float fraction = std::frexp(value, &exponent);
      value = std::ldexp(std::round(std::ldexp(fraction, digits)), exponent - digits);
    }
  }
  for (const auto& [of_g, row, column, value] : entries) {
    (of_g ? g[row * g_stride + column] : x[row * x_stride + column]) = value;
  }
  // What lies between and after the rows of the target must stay, and what is overwritten may be
  // anything.
  const float before = overwrite ? std::numeric_limits<float>::quiet_NaN() : 2.0f;
  std::vector<float> to((height + 1) * stride, before), scratch;
  const float scale = -1.5f;
  const gradnorm::FusedRows of = {g.data(), g_stride, height, x.data(), x_stride, width, rows};
  const double squares = kernel.run(of, scale, overwrite, {to.data(), stride}, scratch);
  const double alone = kernel.run(of, scale, overwrite, {nullptr, 0}, scratch);

  std::vector<float> found;
  std::vector<double> expected, expected_squares(1);
  for (int64_t i = 0; i <= height; ++i) {
    for (int64_t j = 0; j < width && i < height; ++j) {
      double sum = 0;
      for (int64_t r = 0; r < rows; ++r) sum += double(g[r * g_stride + i]) * x[r * x_stride + j];
      expected.push_back((overwrite ? 0 : 2) + scale * sum);
      found.push_back(to[i * stride + j]);
      expected_squares[0] += sum * sum;
    }
    for (int64_t j = i < height ? width : 0; j < stride; ++j) {
      const float kept = to[i * stride + j];
      if (overwrite ? !std::isnan(kept) : kept != before) {
        std::printf("FAIL: what lies between rows changed\n");
        ++check::failures;
      }
    }
  }
  const std::string what = std::string(kernel.instructions) + " " + std::to_string(rows) +
                           " rows [" + std::to_string(height) + ", " + std::to_string(width) + "]";
  check::close(what, found, expected, 16);
  if (!(expected_squares[0] <= kLargest)) {  // infinite or NaN; beyond a tile's edge 0 * infinity
    const bool ok = !std::isfinite(float(squares)) && !std::isfinite(float(alone));
    std::printf("%s: %s: squares beyond float\n", ok ? "ok" : "FAIL", what.c_str());
    check::failures += !ok;
    return;
  }
  check::close(what + ": squares", std::vector<float>{float(squares)}, expected_squares, 16);
  check::close(what + ": squares alone", std::vector<float>{float(alone)}, expected_squares, 16);
}

}  // namespace

// Of all those of numbers whose roundings lean to one side, no product may be further from the
// truth than twice a plain sum in float.
void test_lean(const gradnorm::FusedKernel& kernel) {
  constexpr int64_t kRows = 32;
  std::vector<float> g(kRows), x(kRows), scratch;
  double worst = 0, worst_plain = 0;
  for (int step = 0; step < 4096; ++step) {
    double sum = 0;
    float plain = 0, found;
    for (int64_t r = 0; r < kRows; ++r) {
      g[r] = 1 + float(step) / 4096 + float(r) * 1e-7f;
      x[r] = 1 + float(4095 - step) / 8192;
      sum += double(g[r]) * x[r];
      plain += g[r] * x[r];
    }
    kernel.run({g.data(), 1, 1, x.data(), 1, 1, kRows}, 1, true, {&found, 1}, scratch);
    worst = std::max(worst, std::fabs(found - sum) / sum);
    worst_plain = std::max(worst_plain, std::fabs(plain - sum) / sum);
  }
  const bool ok = worst <= 2 * worst_plain;
  std::printf("%s: %s, numbers that lean: off by %.2g, a plain sum by %.2g\n", ok ? "ok" : "FAIL",
              kernel.instructions, worst, worst_plain);
  check::failures += !ok;
}

// The squares of many numbers are added up in more than float.
void test_many_squares(const gradnorm::FusedKernel& kernel) {
  constexpr int64_t kHeight = 256, kWidth = 1024, kRows = 20;
  const auto g = check::random_rows<float>(kRows * kHeight, 1);
  const auto x = check::random_rows<float>(kRows * kWidth, 2);
  std::vector<float> to(kHeight * kWidth), scratch;
  const gradnorm::FusedRows of = {g.data(), kHeight, kHeight, x.data(), kWidth, kWidth, kRows};
  const double squares = kernel.run(of, 1, true, {to.data(), kWidth}, scratch);
  double expected = 0;
  for (const float value : to) expected += double(value) * value;
  const std::string what = std::string(kernel.instructions) + ": many squares";
  check::close(what, std::vector<float>{float(squares)}, {expected}, 1);
}

int main() {
  for (const gradnorm::FusedKernel& kernel : gradnorm::fused_kernels()) {
    for (const bool overwrite : {true, false}) {
      test(kernel, 1, 1, 1, overwrite);
      test(kernel, 3, kernel.height, kernel.width, overwrite);
      test(kernel, 17, 5 * kernel.height, 3 * kernel.width, overwrite);
      test(kernel, 128, kernel.height - 1, kernel.width + 1, overwrite);
      test(kernel, gradnorm::kFusedRows, 2 * kernel.height + 1, 2 * kernel.width - 3, overwrite);
      test(kernel, 300, 3 * kernel.height - 2, 4 * kernel.width + 7, overwrite);
      test(kernel, 300, 3 * kernel.height, kernel.width, overwrite, {}, 8);  // as bfloat16
      // What is no number, or hardly one, reaches its own row or column and the squares alone.
      for (const float value : {kInfinity, -kInfinity, kNaN, 1e-40f}) {
        test(kernel, 200, 70, 100, overwrite, {{true, 150, 40, value}});
        test(kernel, 200, 70, 100, overwrite, {{false, 190, 33, value}});
      }
      test(kernel, 200, 1, 1, overwrite, {{true, 150, 0, kLargest}, {false, 150, 0, 0.1f}});
      test(kernel, 200, 1, 1, overwrite, {{false, 150, 0, kLargest}, {true, 150, 0, 0.1f}});
    }
    test_lean(kernel);
    test_many_squares(kernel);
  }
  return check::failures != 0;
}
