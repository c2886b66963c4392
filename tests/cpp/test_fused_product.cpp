// The fused products of this processor's instruction sets against sums in double.
#include <cmath>
#include <cstdio>
#include <limits>

#include "check.h"
#include "kernels/cpu/fused_product.h"

namespace {

void test(const gradnorm::FusedKernel& kernel, int64_t rows, int64_t height, int64_t width,
          bool overwrite) {
  const int64_t g_stride = height + 3, x_stride = width + 5, stride = width + 2;
  const auto g = check::random_rows<float>(rows * g_stride, 1),
             x = check::random_rows<float>(rows * x_stride, 2);
  // What lies between the rows of the target must stay, and what is overwritten may be anything.
  const float before = overwrite ? std::numeric_limits<float>::quiet_NaN() : 2.0f;
  std::vector<float> to(height * stride, before), scratch;
  const float scale = -1.5f;
  const gradnorm::FusedRows of = {g.data(), g_stride, height, x.data(), x_stride, width, rows};
  const double squares = kernel.run(of, scale, overwrite, {to.data(), stride}, scratch);
  const double alone = kernel.run(of, scale, overwrite, {nullptr, 0}, scratch);

  std::vector<float> found;
  std::vector<double> expected, expected_squares(1);
  for (int64_t i = 0; i < height; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      double sum = 0;
      for (int64_t r = 0; r < rows; ++r) sum += double(g[r * g_stride + i]) * x[r * x_stride + j];
      expected.push_back((overwrite ? 0 : 2) + scale * sum);
      found.push_back(to[i * stride + j]);
      expected_squares[0] += sum * sum;
    }
    for (int64_t j = width; j < stride && i + 1 < height; ++j) {
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
  check::close(what + ": squares", std::vector<float>{float(squares)}, expected_squares, 16);
  check::close(what + ": squares alone", std::vector<float>{float(alone)}, expected_squares, 16);
}

}  // namespace

int main() {
  for (const gradnorm::FusedKernel& kernel : gradnorm::fused_kernels()) {
    for (const bool overwrite : {true, false}) {
      test(kernel, 1, 1, 1, overwrite);
      test(kernel, 3, kernel.height, kernel.width, overwrite);
      test(kernel, 17, 5 * kernel.height, 3 * kernel.width, overwrite);
      test(kernel, 128, kernel.height - 1, kernel.width + 1, overwrite);
      test(kernel, gradnorm::kFusedRows, 2 * kernel.height + 1, 2 * kernel.width - 3, overwrite);
    }
  }
  return check::failures != 0;
}
