// In place of CUTLASS's header of this name, which is inline assembly: what is used here, emulated.
#pragma once

#include "hopper.h"

namespace cutlass::arch {

struct ClusterBarrier {
  static void init(uint64_t* at, uint32_t count) { emulator::mbarrier_init(at, count); }
  static void wait(const uint64_t* at, uint32_t phase) { emulator::mbarrier_wait(at, phase); }
  static void arrive(uint64_t* at) { emulator::mbarrier_arrive(at); }
};

struct ClusterTransactionBarrier : ClusterBarrier {
  static void arrive_and_expect_tx(uint64_t* at, uint32_t bytes) {
    emulator::mbarrier_arrive(at, bytes);
  }
};

struct NamedBarrier {
  static void sync(uint32_t threads, uint32_t number) {
    emulator::named_barrier(threads, number + 8);  // the first eight are CUTLASS's
  }
};

inline void fence_barrier_init() { emulator::mbarrier_init_fence(); }
inline void fence_view_async_shared() { emulator::hopper.fence_proxy(); }

}  // namespace cutlass::arch
