// outer_wgrad_hopper on the CPU: TMA, wgmma and barriers as hopper.h emulates them.
#include "kernels/cuda/outer_wgrad_hopper.cu"
#include "kernels/cuda/segment_sum.cu"
#include "outer_cases.h"

namespace {

template <gradnorm::OuterKernel kOne, const gradnorm::OuterTile& kOf>
struct Hopper {
  static constexpr auto kKernel = kOne;
  static constexpr auto kTile = kOf;
  template <typename T>
  static void run(const auto&... given) {
    gradnorm::outer_wgrad_hopper<T>(kKernel, given...);
  }
};
using Narrow = Hopper<gradnorm::OuterKernel::kHopper, gradnorm::kHopperTile>;
using Wide = Hopper<gradnorm::OuterKernel::kHopperWide, gradnorm::kHopperWideTile>;

// By how many blocks of rows one warpgroup gets ahead of the other, over ten segments of `length`
// rows, one block each: it squares and adds up its tiles while the other has yet to multiply.
template <typename Fused>
int64_t blocks_ahead(int64_t length) {
  std::vector<int64_t> begins, ends, columns;
  for (int64_t i = 0; i < 10; ++i) {
    begins.push_back(i * length), ends.push_back(begins[i] + length), columns.push_back(i);
  }
  const check::Fenced<int64_t> begin(begins), end(ends), column(columns);
  const gradnorm::OuterWalk walk = {10,      begin.data(), end.data(), begin.data(), column.data(),
                                    nullptr, nullptr,      nullptr};
  const check::Fenced<check::BFloat16> rows(10 * length * 8);
  check::fill(rows, 1);
  const check::Fenced<float> norms(20), dw(64);
  const gradnorm::OuterProduct product = {8, 8, 10 * length, 8, 8, dw.data(), norms.data()};
  std::map<int, int64_t> multiplied;
  int64_t ahead = 0;
  emulator::hopper.trace = [&](int warpgroup, const std::string& what) {
    multiplied[warpgroup] += what == "wgmma.commit_group";
    ahead = std::max(ahead, multiplied[1] - multiplied[2]);
  };
  emulator::order = emulator::Order::kLagging;
  Fused::template run<check::BFloat16>(rows.data(), rows.data(), walk, product, 10, 1, nullptr,
                                       nullptr);
  emulator::order = emulator::Order::kForward;
  emulator::hopper.trace = nullptr;
  return ahead;
}

template <typename Fused>
void test_overlap() {
  using Kernel = gradnorm::Kernel<check::BFloat16, Fused::kKernel>;
  const int64_t whole = blocks_ahead<Fused>(Kernel::kRows);
  const int64_t ragged = blocks_ahead<Fused>(Kernel::kRows - 1);  // both meet to clear its rows
  const bool ok = whole == Kernel::kStages && ragged == 1;
  std::printf("%s one warpgroup gets %d blocks ahead of the other, %d in ragged segments\n",
              ok ? "ok" : "FAIL", int(whole), int(ragged));
  check::failures += !ok;
}

// What keeps the kernel from running is an error that says so, and the next call is right again.
void test_errors() {
  const check::Fenced<check::Half> rows(8 * 8 + 4);
  const check::Fenced<int64_t> begin(std::vector<int64_t>{0}), end(std::vector<int64_t>{8});
  const gradnorm::OuterWalk walk = {1,       begin.data(), end.data(), begin.data(), begin.data(),
                                    nullptr, nullptr,      nullptr};
  const check::Fenced<float> norms(2);
  std::fill_n(rows.data(), rows.size(), check::rounded<check::Half>(1));
  gradnorm::OuterProduct product = {8, 8, 8, 8, 8, nullptr, norms.data()};
  const auto expect = [&](const std::string& message, const check::Half* x) {
    std::string found = "none";
    try {
      Narrow::run<check::Half>(x, rows.data(), walk, product, 1, 1, nullptr, nullptr);
    } catch (const std::runtime_error& error) {
      found = error.what();
    }
    std::printf("%s error: %s\n", found == message ? "ok" : "FAIL", found.c_str());
    check::failures += found != message;
  };
  emulator::next_error = cudaErrorNoKernelImage;
  expect("outer_wgrad: no kernel image is available for execution on the device", rows.data());
  emulator::has_driver = false;
  expect("outer_wgrad: the driver has no cuTensorMapEncodeTiled", rows.data());
  emulator::has_driver = true;
  expect("outer_wgrad: cuTensorMapEncodeTiled failed with 1", rows.data() + 4);
  product.rows = int64_t(1) << 31;
  expect("outer_wgrad: more rows or columns than TMA can address", rows.data());
  product.rows = 8;
  expect("none", rows.data());
  check::failures += norms[0] + norms[1] != 8 * 8 * 8 * 8;
}

template <typename Fused>
void test_all() {
  check::test_outer_cases<Fused, check::Half>();
  check::test_outer_cases<Fused, check::BFloat16>();
  check::test_nan<Fused>();
  test_overlap<Fused>();
}

}  // namespace

int main() {
  test_all<Narrow>();
  test_all<Wide>();
  test_errors();
  return check::failures != 0;
}
