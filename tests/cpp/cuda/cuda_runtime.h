// Runs CUDA kernels on the CPU, for tests: what the sources of csrc/kernels/cuda need of CUDA, in
// C++.
//
// Every thread of a block is a fiber with a stack of its own. A fiber runs until it waits: at
// __syncthreads, or at an operation of its warp (shuffles, matrix products), which is carried out
// when all of its lanes are there. Blocks, warps and lanes run in the order of `emulator::order`,
// one warp as far as it gets before the next; a kernel whose threads pass values without a barrier
// between gives other results in another order, since shared memory starts as NaN and an
// asynchronous copy arrives when it is waited for, no sooner. Refused, with the place: a barrier
// that some threads of the block do not reach, threads that wait at two barriers, a warp's
// operation that some of its lanes do not reach, threads that wait for what never comes.
//
// The matrix instructions of sm_80 are here as PTX documents their fragments; what Hopper adds is
// in hopper.h. Not emulated: memory order without barriers. Arithmetic is the host's.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNoKernelImage = 209 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline dim3 gridDim, blockDim;
inline uint3 blockIdx;

namespace emulator {

// kLagging: forward, the last four warps of a block only when nobody else can go on.
enum class Order { kForward, kBackward, kShuffled, kLagging };
inline Order order = Order::kForward;
inline cudaError_t next_error = cudaSuccess;  // what the next launch returns, instead of running
inline cudaError_t last_error = cudaSuccess;
inline int64_t launches = 0;

struct Refused : std::logic_error {
  using std::logic_error::logic_error;
};

enum class Waits { kNot, kBlock, kWarp, kUntil, kDone };

struct Copy {
  void* to;
  const void* from;
  size_t bytes, filled;  // `bytes` from memory, zeros up to `filled`
};

struct Fiber {
  ucontext_t context;
  uint3 index;
  unsigned number;
  Waits waits;
  const char* place;
  unsigned mask;
  const void* given;
  void* result;
  std::function<bool()> until;           // what is waited for, at kUntil
  std::deque<std::vector<Copy>> groups;  // asynchronous copies; the last group is open
};

constexpr size_t kStack = 128 * 1024;

// What goes on in a block beside its threads.
struct Engine {
  virtual void begin_block() = 0;
  virtual bool advance() = 0;  // when no thread can go on: whether something happened
  virtual void end_block() = 0;

 protected:
  ~Engine() = default;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<unsigned char> shared;
  size_t shared_bytes;  // that the kernel asked for
  int64_t round;        // of the scheduler, which comes to every warp once in a round
  Engine* engine = nullptr;
  ucontext_t scheduler;
  Fiber* current = nullptr;
  std::function<void()> body;
  std::exception_ptr thrown;
};
inline Machine machine;
inline unsigned char* shared_memory() {  // aligned as the kernels ask for
  auto address = reinterpret_cast<uintptr_t>(machine.shared.data());
  return reinterpret_cast<unsigned char*>((address + 1023) / 1024 * 1024);
}

inline void wait(Waits waits, const char* place) {
  Fiber* fiber = machine.current;
  fiber->waits = waits;
  fiber->place = place;
  swapcontext(&fiber->context, &machine.scheduler);
}

inline void barrier(const char* place) { wait(Waits::kBlock, place); }

inline void wait_until(const char* place, const std::function<bool()>& ready) {
  if (ready()) return;
  machine.current->until = ready;
  wait(Waits::kUntil, place);
}

using Lanes = std::vector<Fiber*>;

// Hands `operation` all lanes of the mask of one group of `size` threads (a warp, or a warpgroup
// with one mask for each of its warps), with what each gave and where its result goes, once.
template <typename Given, typename Result, typename Operation>
Result of_group(const char* place, unsigned size, unsigned mask, const Given& given,
                const Operation& operation) {
  Fiber* fiber = machine.current;
  const unsigned first = fiber->number / size * size;
  Result result;
  fiber->given = &given;
  fiber->result = &result;
  fiber->mask = mask;
  fiber->place = place;
  fiber->waits = Waits::kWarp;
  if (!(mask >> fiber->number % 32 & 1)) {
    throw Refused(std::string(place) + ": a lane is missing in the mask it gives");
  }
  Lanes lanes(size, nullptr);
  bool complete = true;
  for (unsigned lane = 0; lane < size; ++lane) {
    if (!(mask >> lane % 32 & 1)) continue;
    const unsigned number = first + lane;
    Fiber* other = number < machine.fibers.size() ? &machine.fibers[number] : nullptr;
    complete &=
        other && other->waits == Waits::kWarp && other->place == place && other->mask == mask;
    lanes[lane] = other;
  }
  if (!complete) {
    wait(Waits::kWarp, place);
    return result;
  }
  operation(lanes);
  for (Fiber* lane : lanes) {
    if (lane) lane->waits = Waits::kNot;
  }
  return result;
}

template <typename Given, typename Result, typename Operation>
Result of_warp(const char* place, unsigned mask, const Given& given, const Operation& operation) {
  return of_group<Given, Result>(place, 32, mask, given, operation);
}

template <typename T>
T shuffle(const char* place, unsigned mask, const T& value, int (*source)(int lane, int by),
          int by) {
  return of_warp<T, T>(place, mask, value, [&](const Lanes& lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      if (!lanes[lane]) continue;
      const int from = source(lane, by);
      if (from < 0 || from > 31 || !lanes[from]) {
        throw Refused(std::string(place) + ": a shuffle from a lane outside the mask");
      }
      *static_cast<T*>(lanes[lane]->result) = *static_cast<const T*>(lanes[from]->given);
    }
  });
}

inline void run_fiber() {
  try {
    machine.body();
  } catch (...) {
    machine.thrown = std::current_exception();
  }
  machine.current->waits = Waits::kDone;
  swapcontext(&machine.current->context, &machine.scheduler);
}

inline void arrange(std::vector<int64_t>& places) {
  static std::mt19937 random(0);
  std::iota(places.begin(), places.end(), 0);
  if (order == Order::kBackward) std::reverse(places.begin(), places.end());
  if (order == Order::kShuffled) std::shuffle(places.begin(), places.end(), random);
}

[[noreturn]] inline void refuse(const std::string& what) {
  throw Refused(what + " in block " + std::to_string(blockIdx.x));
}

// All threads wait, or are done.
inline void pass_barrier() {
  const char* place = nullptr;
  for (const Fiber& fiber : machine.fibers) {
    if (fiber.waits == Waits::kWarp) {
      refuse(std::string(fiber.place) + ": a warp's operation that not all of its lanes reach,");
    }
    if (fiber.waits == Waits::kUntil) {
      refuse(std::string(fiber.place) + ": threads wait for what never comes");
    }
    if (fiber.waits != Waits::kBlock) continue;
    if (place && place != fiber.place) {
      refuse(std::string(place) + " and " + fiber.place + ": threads wait at two barriers");
    }
    place = fiber.place;
  }
  for (Fiber& fiber : machine.fibers) {
    if (fiber.waits == Waits::kDone) {
      refuse(std::string(place) + ": a barrier that not all threads reach,");
    }
    fiber.waits = Waits::kNot;
  }
}

inline void run_block(size_t shared_bytes) {
  Machine& m = machine;
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  m.shared.assign(shared_bytes + 1024, 0xff);  // NaN in every type of floats
  m.shared_bytes = shared_bytes;
  m.round = 0;
  if (m.engine) m.engine->begin_block();
  m.fibers.clear();
  m.fibers.resize(threads);
  while (m.stacks.size() < threads) m.stacks.push_back(std::make_unique<char[]>(kStack));
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = m.fibers[i];
    fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    fiber.number = i;
    fiber.waits = Waits::kNot;
    fiber.groups.emplace_back();
    getcontext(&fiber.context);
    fiber.context.uc_stack = {m.stacks[i].get(), 0, kStack};
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  // A warp runs until all of its lanes wait for the block, before another one does: as far ahead of
  // the others as it can get.
  std::vector<int64_t> warps((threads + 31) / 32), lanes(32);
  const int64_t lagging = order == Order::kLagging ? int64_t(warps.size()) - 4 : warps.size();
  for (bool comes_to_all = false;;) {
    const bool all = std::exchange(comes_to_all, false);
    bool ran = false, all_done = true;
    ++m.round;
    arrange(warps);
    for (const int64_t warp : warps) {
      if (warp >= lagging && !all) continue;
      for (bool runs = true; runs;) {
        runs = false;
        arrange(lanes);
        for (const int64_t lane : lanes) {
          if (warp * 32 + lane >= int64_t(threads)) continue;
          Fiber& fiber = m.fibers[warp * 32 + lane];
          if (fiber.waits == Waits::kUntil && fiber.until()) fiber.waits = Waits::kNot;
          if (fiber.waits != Waits::kNot) continue;
          ran = runs = true;
          m.current = &fiber;
          swapcontext(&m.scheduler, &fiber.context);
          if (m.thrown) std::rethrow_exception(std::exchange(m.thrown, nullptr));
        }
      }
    }
    bool all_at_barrier = true;
    for (const Fiber& fiber : m.fibers) {
      all_done &= fiber.waits == Waits::kDone;
      all_at_barrier &= fiber.waits == Waits::kBlock;
    }
    if (all_done) break;
    if (ran || (!all_at_barrier && m.engine && m.engine->advance())) continue;
    if (order == Order::kLagging && !all) {
      comes_to_all = true;
    } else {
      pass_barrier();
    }
  }
  if (m.engine) m.engine->end_block();
}

// cp.async: the memory holds NaN until the copy is waited for.
inline void copy_async(void* to, const void* from, size_t bytes, size_t filled) {
  std::memset(to, 0xff, filled);
  machine.current->groups.back().push_back({to, from, bytes, filled});
}
inline void commit_copies() { machine.current->groups.emplace_back(); }
inline void wait_copies(size_t pending) {
  auto& groups = machine.current->groups;
  for (; groups.size() > pending + 1; groups.pop_front()) {
    for (const Copy& copy : groups.front()) {
      std::memset(copy.to, 0, copy.filled);
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
  }
}

using Matrices = std::array<unsigned, 4>;

// ldmatrix.m8n8.x4.trans.b16: lane 8 i + r gives row r of matrix i; lane 4 c + r gets, of column c
// of each matrix, rows 2 r and 2 r + 1.
inline Matrices load_matrices_transposed(const char* place, const void* row) {
  return of_warp<const void*, Matrices>(place, 0xffffffffu, row, [](const Lanes& lanes) {
    uint16_t matrices[4][8][8];
    for (int i = 0; i < 32; ++i) {
      std::memcpy(matrices[i / 8][i % 8], *static_cast<const void* const*>(lanes[i]->given), 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const unsigned low = matrices[i][lane % 4 * 2][lane / 4];
        const unsigned high = matrices[i][lane % 4 * 2 + 1][lane / 4];
        (*static_cast<Matrices*>(lanes[lane]->result))[i] = low | high << 16;
      }
    }
  });
}

struct Fragments {
  unsigned a[4], b[2];
  float c[4];
};

// mma.m16n8k16, a [16, 16] by rows and b [16, 8] by columns, with sums in float.
template <typename Widen>
std::array<float, 4> multiply_add(const char* place, const Fragments& given, const Widen& widen) {
  return of_warp<Fragments, std::array<float, 4>>(
      place, 0xffffffffu, given, [&](const Lanes& lanes) {
        float a[16][16], b[16][8];
        for (int lane = 0; lane < 32; ++lane) {
          const auto& of = *static_cast<const Fragments*>(lanes[lane]->given);
          const int group = lane / 4, pair = lane % 4 * 2;
          for (int i = 0; i < 8; ++i) {
            a[group + (i / 2 % 2) * 8][pair + i % 2 + i / 4 * 8] =
                widen(uint16_t(of.a[i / 2] >> i % 2 * 16));
          }
          for (int i = 0; i < 4; ++i) {
            b[pair + i % 2 + i / 2 * 8][group] = widen(uint16_t(of.b[i / 2] >> i % 2 * 16));
          }
        }
        for (int lane = 0; lane < 32; ++lane) {
          const auto& of = *static_cast<const Fragments*>(lanes[lane]->given);
          for (int i = 0; i < 4; ++i) {
            float sum = of.c[i];
            for (int k = 0; k < 16; ++k) {
              sum += a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2];
            }
            (*static_cast<std::array<float, 4>*>(lanes[lane]->result))[i] = sum;
          }
        }
      });
}

inline float widen_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double value = exponent == 31  ? (mantissa ? NAN : INFINITY)
                       : exponent == 0 ? std::ldexp(mantissa, -24)
                                       : std::ldexp(1024 + mantissa, exponent - 25);
  return static_cast<float>(bits >> 15 ? -value : value);
}

}  // namespace emulator

#define threadIdx (emulator::machine.current->index)

#define EMULATOR_TEXT_(text) #text
#define EMULATOR_TEXT(text) EMULATOR_TEXT_(text)
#define EMULATOR_PLACE __FILE__ ":" EMULATOR_TEXT(__LINE__)
#define __syncthreads() emulator::barrier(EMULATOR_PLACE)
#define __syncwarp(...) \
  ((void)emulator::of_warp<int, int>(EMULATOR_PLACE, 0xffffffffu, 0, [](const auto&) {}))
#define __shfl_xor_sync(mask, value, by) \
  emulator::shuffle(EMULATOR_PLACE, mask, value, +[](int lane, int b) { return lane ^ b; }, by)
#define __shfl_down_sync(mask, value, by) \
  emulator::shuffle(                      \
      EMULATOR_PLACE, mask, value,        \
      +[](int lane, int b) { return lane + b < 32 ? lane + b : lane; }, by)
#define __shfl_sync(mask, value, from) \
  emulator::shuffle(EMULATOR_PLACE, mask, value, +[](int, int f) { return f % 32; }, from)

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorNoKernelImage
             ? "no kernel image is available for execution on the device"
         : error == cudaSuccess ? "no error"
                                : "invalid argument";
}

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return std::exchange(emulator::last_error, cudaSuccess); }

namespace emulator {
// What was asked for, or what else is wrong.
inline cudaError_t failure(bool is_valid) {
  const cudaError_t asked = std::exchange(next_error, cudaSuccess);
  if (asked != cudaSuccess || !is_valid) {
    last_error = asked != cudaSuccess ? asked : cudaErrorInvalidValue;
  }
  return last_error;
}
}  // namespace emulator

inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  return emulator::failure(value <= 227 * 1024);
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 block = config->blockDim;
  const unsigned threads = block.x * block.y * block.z;
  const cudaError_t error = emulator::failure(threads > 0 && threads <= 1024);
  if (error != cudaSuccess) return error;
  ++emulator::launches;
  gridDim = config->gridDim;
  blockDim = block;
  const std::tuple<Parameters...> given(std::forward<Arguments>(arguments)...);
  emulator::machine.body = [&] { std::apply(kernel, given); };
  std::vector<int64_t> blocks(config->gridDim.x);
  emulator::arrange(blocks);
  for (const int64_t i : blocks) {
    blockIdx = {static_cast<unsigned>(i), 0, 0};
    emulator::run_block(config->dynamicSmemBytes);
  }
  return cudaSuccess;
}
