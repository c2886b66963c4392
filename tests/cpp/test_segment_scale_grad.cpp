// segment_scale_grad_cpu against a loop in double.
#include "check.h"
#include "kernels/segment_scale_grad.h"

namespace {

template <typename T>
void test(const std::string& what, const std::vector<int64_t>& offsets, int64_t width,
          bool shifted) {
  const int64_t segments = static_cast<int64_t>(offsets.size()) - 1, rows = offsets.back();
  const int64_t stride = width + 3;
  const auto x = check::random_rows<T>(rows * stride, 1),
             g = check::random_rows<T>(rows * stride, 2);
  const auto shift = check::random_rows<T>(rows, 3), scale = check::random_rows<T>(rows, 4);
  std::vector<T> out(segments * width, std::numeric_limits<T>::quiet_NaN());
  gradnorm::segment_scale_grad_cpu(x.data(), stride, g.data(), stride, width,
                                   shifted ? shift.data() : nullptr,
                                   shifted ? scale.data() : nullptr, offsets.data(), segments,
                                   out.data(), check::naive_host<T>());

  std::vector<double> expected(segments * width);
  for (int64_t s = 0; s < segments; ++s) {
    for (int64_t r = offsets[s]; r < offsets[s + 1]; ++r) {
      for (int64_t i = 0; i < width; ++i) {
        const double from = double(x[r * stride + i]) - (shifted ? double(shift[r]) : 0);
        expected[s * width + i] +=
            double(g[r * stride + i]) * from * (shifted ? double(scale[r]) : 1);
      }
    }
  }
  check::close(what, out, expected, 64);  // runs of 64 rows are added up in T
}

template <typename T>
void test_all() {
  for (const bool shifted : {false, true}) {
    const std::string how = shifted ? ", shifted and scaled" : "";
    test<T>("one row" + how, {0, 1}, 5, shifted);
    test<T>("no segments" + how, {0}, 5, shifted);
    test<T>("ragged segments, one of them empty" + how, {0, 7, 7, 70, 1070}, 300, shifted);
  }
}

}  // namespace

int main() {
  test_all<float>();
  test_all<double>();
  return check::failures != 0;
}
