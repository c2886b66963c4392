// outer_wgrad_ampere on the CPU, fragments, asynchronous copies and all.
#include "kernels/cuda/outer_wgrad.cu"
#include "kernels/cuda/segment_sum.cu"
#include "outer_cases.h"

namespace {

struct Ampere {
  static constexpr auto kKernel = gradnorm::OuterKernel::kAmpere;
  static constexpr auto kTile = gradnorm::kAmpereTile;
  template <typename T>
  static void run(const auto&... given) {
    gradnorm::outer_wgrad_ampere<T>(given...);
  }
};

}  // namespace

int main() {
  check::test_outer_cases<Ampere, check::Half>();
  check::test_outer_cases<Ampere, check::BFloat16>();
  check::test_nan<Ampere>();
  return check::failures != 0;
}
