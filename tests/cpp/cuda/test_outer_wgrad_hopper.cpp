// outer_wgrad_hopper on the CPU: TMA, wgmma and barriers as hopper.h emulates them.
#include "kernels/cuda/outer_wgrad_hopper.cu"
#include "kernels/cuda/sum_sums.cu"
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

template <typename Fused>
void test_all() {
  check::test_outer_cases<Fused, check::Half>();
  check::test_outer_cases<Fused, check::BFloat16>();
  check::test_nan<Fused>();
}

}  // namespace

int main() {
  test_all<Narrow>();
  test_all<Wide>();
  return check::failures != 0;
}
