// CUTLASS's header of this name, but for the loads that are used here: emulated instead.
#pragma once

#define SM90_TMA_LOAD_2D SM90_TMA_LOAD_2D_of_cutlass
#include_next <cute/arch/copy_sm90_tma.hpp>
#undef SM90_TMA_LOAD_2D

#include "hopper.h"

namespace cute {

struct SM90_TMA_LOAD_2D {
  static void copy(const void* map, uint64_t* barrier, uint64_t /*cache_hint*/, void* to,
                   int32_t column, int32_t row) {
    emulator::load_tile(map, barrier, to, column, row);
  }
};

}  // namespace cute
