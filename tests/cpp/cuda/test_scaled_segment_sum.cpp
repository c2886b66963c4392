// segment_sum_cuda and segment_scale_grad_cuda on the CPU, against loops in double.
#include "emulated.h"
#include "kernels/cuda/segment_scale_grad.cu"
#include "kernels/cuda/segment_sum.cu"

namespace {

using gradnorm::Accumulator;

template <typename T>
void test(const std::vector<int64_t>& lengths, int64_t width, int64_t stride, int64_t shifted_by,
          int64_t x_apart = 0) {
  using A = Accumulator<T>;
  const int64_t segments = int64_t(lengths.size());
  std::vector<int64_t> rising = {0};
  for (const int64_t length : lengths) rising.push_back(rising.back() + length);
  const int64_t rows = rising.back();
  const check::Fenced<int64_t> offsets(rising);
  // The last row ends where the memory ends.
  const int64_t x_stride = stride + x_apart, before_last = rows ? rows - 1 : 0;
  const int64_t last = shifted_by + (rows ? width : 0);
  const check::Fenced<T> of_x(before_last * x_stride + last), of_g(before_last * stride + last);
  const check::Fenced<A> shift(rows), scale(rows);
  check::fill(of_x, 1), check::fill(of_g, 2), check::fill(shift, 3), check::fill(scale, 4);
  const T *x = of_x.data() + shifted_by, *g = of_g.data() + shifted_by;
  const std::string what = std::string(check::name_of<T>()) + ", " + std::to_string(segments) +
                           " segments of " + std::to_string(rows) + " rows of " +
                           std::to_string(width);

  for (const bool has_x : {false, true}) {
    std::vector<double> expected(segments * width), size_of(segments * width);
    for (int64_t s = 0; s < segments; ++s) {
      for (int64_t r = rising[s]; r < rising[s + 1]; ++r) {
        for (int64_t i = 0; i < width; ++i) {
          const double factor =
              has_x ? (check::value_of(x[r * x_stride + i]) - double(shift[r])) * double(scale[r])
                    : 1;
          expected[s * width + i] += check::value_of(g[r * stride + i]) * factor;
        }
      }
    }
    const std::function<std::vector<A>()> run = [&] {
      const check::Fenced<A> out(segments * width);
      emulator::launches = 0;
      if (has_x) {
        const check::Fenced<A> workspace(
            gradnorm::segment_scale_grad_workspace(x, x_stride, g, stride, rows, width, segments));
        gradnorm::segment_scale_grad_cuda(x, x_stride, g, stride, rows, width,
                                          static_cast<const A*>(shift.data()),
                                          static_cast<const A*>(scale.data()), offsets.data(),
                                          segments, out.data(), workspace.data(), nullptr);
        check::failures += emulator::launches > (workspace.size() ? 2 : 1);
      } else {
        const check::Fenced<A> workspace(
            gradnorm::segment_sum_workspace(g, stride, rows, width, segments));
        gradnorm::segment_sum_cuda(g, stride, rows, width, offsets.data(), segments, out.data(),
                                   workspace.data(), nullptr);
        check::failures += emulator::launches > (workspace.size() ? 2 : 1);
      }
      return out.values();
    };
    check::close(what + (has_x ? ", products" : ""), check::in_every_order(what, run), expected,
                 64);
  }
}

template <typename T>
void test_all() {
  constexpr int64_t kWide = 16 / sizeof(T);
  test<T>({}, 5, 5, 0);
  test<T>({0}, 5, 5, 0);
  test<T>({1}, 1, 1, 0);
  test<T>({1, 1, 1, 1, 1}, 3, 3, 0);
  test<T>({7, 0, 63, 1}, 33, 40, 0);                              // wide loads, a tail of columns
  test<T>({7, 0, 63, 1}, 32 * kWide + 1, 32 * kWide + kWide, 0);  // two stretches of columns
  test<T>({7, 0, 63, 1}, 40, 41, 0);                              // rows on no multiple of 16 bytes
  test<T>({7, 0, 63, 1}, 40, 40, 0, 1);                           // rows of x alone
  test<T>({5, 9}, 2 * kWide, 2 * kWide, kWide / 2);               // all of them off by half
  test<T>({700}, 6, 8, 0);                                        // chunks
  test<T>({300, 0, 700}, 17, 17, 0);
}

}  // namespace

int main() {
  test_all<float>();
  test_all<double>();
  test_all<check::Half>();
  test_all<check::BFloat16>();
  return check::failures != 0;
}
