// outer_wgrad_hopper on the CPU: TMA, wgmma and barriers as hopper.h emulates them.
#include "kernels/cuda/outer_wgrad_hopper.cu"
#include "kernels/cuda/sum_sums.cu"
#include "outer_cases.h"

namespace {

struct Hopper {
  static constexpr auto kKernel = gradnorm::OuterKernel::kHopper;
  static constexpr auto kTile = gradnorm::kHopperTile;
  template <typename T>
  static void run(const auto&... given) {
    gradnorm::outer_wgrad_hopper<T>(given...);
  }
};

}  // namespace

int main() {
  check::test_outer_cases<Hopper, check::Half>();
  check::test_outer_cases<Hopper, check::BFloat16>();
  check::test_nan<Hopper>();
  return check::failures != 0;
}
