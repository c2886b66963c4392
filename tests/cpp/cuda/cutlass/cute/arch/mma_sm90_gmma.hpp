// CUTLASS's header of this name, but for what is inline assembly and used here: emulated instead.
#pragma once

#define warpgroup_arrive warpgroup_arrive_of_cutlass
#define warpgroup_commit_batch warpgroup_commit_batch_of_cutlass
#define warpgroup_wait warpgroup_wait_of_cutlass
#include_next <cute/arch/mma_sm90_gmma.hpp>
#undef warpgroup_arrive
#undef warpgroup_commit_batch
#undef warpgroup_wait

#include "hopper.h"

namespace cute {

inline void warpgroup_arrive() { emulator::wgmma_fence(); }
inline void warpgroup_commit_batch() { emulator::wgmma_commit(); }
template <int N>
void warpgroup_wait() {
  emulator::wgmma_wait(N);
}

namespace SM90::GMMA {

template <int kColumns, float (*kWiden)(uint16_t)>
struct Emulated {
  using DRegisters = void;
  using ARegisters = uint64_t[1];
  using BRegisters = uint64_t[1];
  using CRegisters = float[kColumns / 2];
  // An object, since CuTe passes it on: descriptors, accumulators, and whether to add to these.
  static constexpr auto fma = [](uint64_t a, uint64_t b, auto&... rest) {
    [&]<size_t... kIs>(std::index_sequence<kIs...>, auto all) {
      emulator::Wgmma<kColumns, kWiden>::multiply(a, b, std::get<sizeof...(kIs)>(all),
                                                  std::get<kIs>(all)...);
    }(std::make_index_sequence<sizeof...(rest) - 1>(), std::tie(rest...));
  };
};

#define EMULATED(name, columns, widen) \
  template <>                          \
  struct name<Major::MN, Major::MN, ScaleIn::One, ScaleIn::One> : Emulated<columns, widen> {};
EMULATED(MMA_64x192x16_F32F16F16_SS, 192, emulator::widen_half)
EMULATED(MMA_64x256x16_F32F16F16_SS, 256, emulator::widen_half)
EMULATED(MMA_64x192x16_F32BF16BF16_SS, 192, emulator::widen_bfloat16)
EMULATED(MMA_64x256x16_F32BF16BF16_SS, 256, emulator::widen_bfloat16)
#undef EMULATED

}  // namespace SM90::GMMA
}  // namespace cute
