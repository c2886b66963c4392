// What Hopper adds, emulated: mbarriers, TMA loads of tiles, wgmma, named barriers, the
// asynchronous proxy. Written after the PTX ISA and the driver's manual, and without CuTe's
// layouts, which the kernels use: that both mean the same places is what is tested.
//
// A tile's copy destroys what was in its place at once. It arrives at once in a forward order;
// in the others when nobody can go on otherwise, the last one first, or in a random order. A
// product by wgmma takes effect when it is waited for: until then its accumulators are NaN, and
// what it multiplies must stay as it was. Refused, with the instruction: shared memory that
// changes, or accumulators that are written, under a product; a product of what was written to
// shared memory without fence.proxy.async; a product without wgmma.fence; descriptors that differ
// within a warpgroup; an mbarrier that is not initialised, or at which more threads arrive than it
// expects; copies and products that a block leaves behind.
//
// Not told apart: whose writes a fence.proxy.async orders (here, all until then), and the warps of
// a warpgroup, which pass every instruction of wgmma together. setmaxnreg does nothing.
#pragma once

#include <cuda_runtime.h>

#include <list>
#include <map>

using CUresult = int;
using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
constexpr CUresult CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1;
enum CUtensorMapDataType {
  CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6,
  CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9
};
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle {
  CU_TENSOR_MAP_SWIZZLE_NONE,
  CU_TENSOR_MAP_SWIZZLE_32B,
  CU_TENSOR_MAP_SWIZZLE_64B,
  CU_TENSOR_MAP_SWIZZLE_128B
};
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

struct alignas(64) CUtensorMap {  // rows of two-byte entries
  const unsigned char* rows;
  uint64_t width, count, stride;  // stride in bytes
  uint32_t box_width, box_rows;
  CUtensorMapSwizzle swizzle;
};

namespace emulator {

// A 16-byte piece's place under a swizzle: its number within 128, 64 or 32 bytes is mixed with that
// of the 128-byte line it lies in. Addresses are those of shared memory.
inline uint32_t swizzled(uint32_t address, int bits) {
  return address ^ ((address >> 7 & ((1u << bits) - 1)) << 4);
}

constexpr uint32_t kSharedBase = 1024;  // the address of the kernel's first byte; any 1024 will do

inline uint32_t address_of(const void* pointer) {
  return uint32_t(static_cast<const unsigned char*>(pointer) - shared_memory()) + kSharedBase;
}

// The state of an mbarrier, in the eight bytes it has.
struct Mbarrier {
  uint64_t kind : 2, phase : 1, expected : 20, pending : 20, bytes : 21;
  static constexpr uint64_t kInitialized = 1, kFenced = 2;  // memory starts as all ones

  static Mbarrier read(const char* place, const void* at) {
    Mbarrier barrier;
    std::memcpy(&barrier, at, 8);
    if (barrier.kind != kInitialized && barrier.kind != kFenced) {
      refuse(std::string(place) + ": an mbarrier that is not initialised,");
    }
    return barrier;
  }
  void write(const char* place, void* at) {
    if (bytes > 1u << 20) refuse(std::string(place) + ": more bytes than are expected,");
    if (pending == 0 && bytes == 0) {
      phase ^= 1;
      pending = expected;
    }
    std::memcpy(at, this, 8);
  }
};
static_assert(sizeof(Mbarrier) == 8);

struct TileCopy {
  CUtensorMap map;
  void* barrier;
  unsigned char* to;
  int32_t column, row;

  uint32_t bytes() const { return map.box_width * map.box_rows * 2; }
};

// One operand of a product, [16, size]: neighbours along the other matrix's axis ("MN-major").
struct Operand {
  uint64_t descriptor;
  int size;
  std::vector<uint16_t> values = {};

  // The addresses of pieces of eight neighbours. The pattern is one of 64, 32 or 16 neighbours (the
  // bytes of the swizzle) by 8 rows of 128, 64 or 32 bytes: the leading offset leads to the next
  // neighbours, the stride offset to the next 8 rows.
  template <typename Visit>
  void pieces(const Visit& visit) const {
    const auto field = [&](int bit) { return uint32_t(descriptor >> bit & 0x3fff) << 4; };
    const uint32_t start = field(0), leading = field(16), stride = field(32);
    const int mode = int(descriptor >> 62), bits = mode == 0 ? 0 : 4 - mode;
    if (mode == 0) refuse("wgmma: operands that are not swizzled are not emulated,");
    if (descriptor >> 49 & 7) refuse("wgmma: base offsets are not emulated,");
    const int line = 16 << bits, neighbours = line / 2;
    for (int k = 0; k < 16; ++k) {
      for (int i = 0; i < size; i += 8) {
        const uint32_t address =
            start + i / neighbours * leading + i % neighbours * 2 + k / 8 * stride + k % 8 * line;
        visit(k * size + i, swizzled(address, bits));
      }
    }
  }
};

// The accumulators of a product, and of those after it that add to the same.
struct Accumulators {
  static constexpr uint32_t kPoison = 0x7fc0feed;
  std::vector<std::vector<float*>> registers;  // of each thread
  std::vector<float> values;                   // [64, columns]
  int columns, pending = 0;

  // Where a thread's i-th register belongs.
  float& value(int thread, int i) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
    return values[row * columns + i / 4 * 8 + thread % 4 * 2 + i % 2];
  }
  template <typename Visit>
  void each(const Visit& visit) {
    for (int thread = 0; thread < 128; ++thread) {
      for (int i = 0; i < columns / 2; ++i) visit(*registers[thread][i], value(thread, i));
    }
  }
};

struct Product {
  Operand a, b;
  Accumulators* sum;
  bool adds;
  float (*widen)(uint16_t);
};

struct Warpgroup {
  bool is_fenced = false;
  std::list<Accumulators> sums;
  std::vector<Product> open;
  std::deque<std::vector<Product>> committed;
};

struct Hopper final : Engine {
  std::vector<unsigned char> visible;  // shared memory, as the asynchronous proxy sees it
  std::vector<TileCopy> copies;        // on their way
  std::map<int, Warpgroup> warpgroups;
  struct {
    unsigned threads, arrived;
    int64_t generation;
  } named[16];
  std::vector<void*> unfenced;  // mbarriers
  std::mt19937 random{0};
  // For tests of how far apart warpgroups get: called with a warpgroup's number and what it does.
  std::function<void(int, const char*)> trace;

  Hopper() { machine.engine = this; }

  void begin_block() override {
    visible.assign(machine.shared_bytes, 0xff);
    copies.clear();
    warpgroups.clear();
    unfenced.clear();
    for (auto& barrier : named) barrier = {};
  }
  bool advance() override {
    if (copies.empty()) return false;
    if (order == Order::kShuffled) std::swap(copies[random() % copies.size()], copies.back());
    const TileCopy copy = copies.back();
    copies.pop_back();
    arrive(copy);
    return true;
  }
  void end_block() override {
    if (!copies.empty()) refuse("cp.async.bulk.tensor: a copy is still under way at the end");
    for (const auto& [number, group] : warpgroups) {
      if (!group.sums.empty()) refuse("wgmma: a product is still under way at the end");
    }
  }

  unsigned char* memory(const char* place, uint32_t address, uint32_t bytes) {
    if (address < kSharedBase || address - kSharedBase + bytes > machine.shared_bytes) {
      refuse(std::string(place) + ": an address outside shared memory,");
    }
    return shared_memory() + (address - kSharedBase);
  }

  void write(uint32_t address, const void* from, uint32_t bytes) {
    std::memcpy(memory("cp.async.bulk.tensor", address, bytes), from, bytes);
    std::memcpy(visible.data() + (address - kSharedBase), from, bytes);
  }

  void issue(const TileCopy& copy) {
    constexpr const char* kPlace = "cp.async.bulk.tensor";
    const uint32_t to = address_of(copy.to);
    if (to % 128) refuse(std::string(kPlace) + ": a place that is no multiple of 128 bytes,");
    if (Mbarrier::read(kPlace, copy.barrier).kind != Mbarrier::kFenced) {
      refuse(std::string(kPlace) + ": an mbarrier without fence.mbarrier_init,");
    }
    write(to, std::vector<unsigned char>(copy.bytes(), 0xff).data(), copy.bytes());
    copies.push_back(copy);
    if (order == Order::kForward) advance();
  }

  void arrive(const TileCopy& copy) {
    const CUtensorMap& map = copy.map;
    const int bits = map.swizzle, pieces = map.box_width / 8;
    for (uint32_t r = 0; r < map.box_rows; ++r) {
      for (int piece = 0; piece < pieces; ++piece) {
        uint16_t values[8] = {};
        const int64_t row = int64_t(copy.row) + r, column = int64_t(copy.column) + piece * 8;
        for (int i = 0; i < 8; ++i) {
          if (row < 0 || row >= int64_t(map.count)) continue;
          if (column + i < 0 || column + i >= int64_t(map.width)) continue;
          std::memcpy(&values[i], map.rows + row * map.stride + (column + i) * 2, 2);
        }
        write(swizzled(address_of(copy.to) + r * map.box_width * 2 + piece * 16, bits), values, 16);
      }
    }
    Mbarrier barrier = Mbarrier::read("complete_tx", copy.barrier);
    barrier.bytes -= copy.bytes();
    barrier.write("complete_tx", copy.barrier);
  }

  void fence_proxy() { std::memcpy(visible.data(), shared_memory(), visible.size()); }

  std::vector<uint16_t> read(const Operand& operand, bool must_be_visible) {
    std::vector<uint16_t> values(16 * operand.size);
    operand.pieces([&](int place, uint32_t address) {
      const unsigned char* piece = memory("wgmma", address, 16);
      std::memcpy(values.data() + place, piece, 16);
      if (must_be_visible && std::memcmp(piece, visible.data() + (address - kSharedBase), 16)) {
        refuse("wgmma: what was written to shared memory without fence.proxy.async,");
      }
    });
    return values;
  }

  void carry_out(const Product& product) {
    if (read(product.a, false) != product.a.values || read(product.b, false) != product.b.values) {
      refuse("wgmma: shared memory that changed under a product,");
    }
    Accumulators& sum = *product.sum;
    std::vector<float> a(16 * 64), b(16 * sum.columns);
    std::transform(product.a.values.begin(), product.a.values.end(), a.begin(), product.widen);
    std::transform(product.b.values.begin(), product.b.values.end(), b.begin(), product.widen);
    for (int m = 0; m < 64; ++m) {
      float* out = sum.values.data() + m * sum.columns;
      if (!product.adds) std::fill_n(out, sum.columns, 0.0f);
      for (int k = 0; k < 16; ++k) {
        const float left = a[k * 64 + m];
        const float* right = b.data() + k * sum.columns;
        for (int n = 0; n < sum.columns; ++n) out[n] += left * right[n];
      }
    }
    if (--sum.pending > 0) return;
    sum.each([](float& at, float value) {
      uint32_t bits;
      std::memcpy(&bits, &at, 4);
      if (bits != Accumulators::kPoison) refuse("wgmma: accumulators written under a product,");
      at = value;
    });
  }
};
inline Hopper hopper;

// What each thread gives to a product.
struct Multiplied {
  uint64_t a, b;
  bool adds;
  std::vector<float*> registers;
};

struct Nothing {};

template <typename Operation>
void of_warpgroup(const char* place, const Operation& operation) {
  of_group<Nothing, Nothing>(place, 128, 0xffffffffu, {}, [&](const Lanes& lanes) {
    const int number = int(lanes[0]->number / 128);
    if (hopper.trace) hopper.trace(number, place);
    operation(hopper.warpgroups[number]);
  });
}

inline void wgmma_fence() {
  of_warpgroup("wgmma.fence", [](Warpgroup& group) { group.is_fenced = true; });
}

inline void wgmma_commit() {
  of_warpgroup("wgmma.commit_group",
               [](Warpgroup& group) { group.committed.push_back(std::exchange(group.open, {})); });
}

inline void wgmma_wait(size_t pending) {
  of_warpgroup("wgmma.wait_group", [&](Warpgroup& group) {
    for (; group.committed.size() > pending; group.committed.pop_front()) {
      for (const Product& product : group.committed.front()) hopper.carry_out(product);
    }
    const auto is_done = [](const Accumulators& sum) { return sum.pending == 0; };
    if (std::erase_if(group.sums, is_done)) group.is_fenced = false;
  });
}

// wgmma.mma_async.m64n<kColumns>k16 with both operands in shared memory, neighbours of the product
// side by side.
template <int kColumns, float (*kWiden)(uint16_t)>
struct Wgmma {
  template <typename Scale, typename... Registers>
  static void multiply(uint64_t a, uint64_t b, Scale adds, Registers&... registers) {
    static_assert(sizeof...(registers) == kColumns / 2);
    constexpr const char* kPlace = "wgmma.mma_async";
    const Multiplied given = {a, b, adds == Scale::One, {&registers...}};
    of_group<Multiplied, Nothing>(kPlace, 128, 0xffffffffu, given, [&](const Lanes& lanes) {
      const int number = int(lanes[0]->number / 128);
      if (hopper.trace) hopper.trace(number, kPlace);
      Warpgroup& group = hopper.warpgroups[number];
      const auto same = [&](const Accumulators& sum) {
        return sum.registers[0] == static_cast<const Multiplied*>(lanes[0]->given)->registers;
      };
      auto sum = std::find_if(group.sums.begin(), group.sums.end(), same);
      if (sum == group.sums.end()) {
        if (!group.is_fenced) refuse("wgmma: accumulators without wgmma.fence before,");
        sum = group.sums.insert(sum, Accumulators{{}, std::vector<float>(64 * kColumns), kColumns});
        for (const Fiber* lane : lanes) {
          sum->registers.push_back(static_cast<const Multiplied*>(lane->given)->registers);
        }
        sum->each([](float& at, float& value) {
          value = at;
          std::memcpy(&at, &Accumulators::kPoison, 4);
        });
      }
      for (const Fiber* lane : lanes) {
        const auto& of = *static_cast<const Multiplied*>(lane->given);
        if (of.a != given.a || of.b != given.b || of.adds != given.adds) {
          refuse("wgmma: descriptors that differ within a warpgroup,");
        }
      }
      Product product = {{a, 64}, {b, kColumns}, &*sum, given.adds, kWiden};
      product.a.values = hopper.read(product.a, true);
      product.b.values = hopper.read(product.b, true);
      ++sum->pending;
      group.open.push_back(std::move(product));
    });
  }
};

inline float widen_bfloat16(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline void mbarrier_init(void* at, uint32_t count) {
  const Mbarrier barrier = {Mbarrier::kInitialized, 0, count, count, 0};
  std::memcpy(at, &barrier, 8);
  hopper.unfenced.push_back(at);
}

inline void mbarrier_init_fence() {
  for (void* at : std::exchange(hopper.unfenced, {})) {
    Mbarrier barrier = Mbarrier::read("fence.mbarrier_init", at);
    barrier.kind = Mbarrier::kFenced;
    std::memcpy(at, &barrier, 8);
  }
}

// Who waited for the arrival goes first.
inline void mbarrier_arrive(void* at, uint32_t bytes = 0) {
  constexpr const char* kPlace = "mbarrier.arrive";
  Mbarrier barrier = Mbarrier::read(kPlace, at);
  if (barrier.pending == 0) refuse(std::string(kPlace) + ": more arrivals than are expected,");
  const uint64_t phase = barrier.phase;
  barrier.bytes += bytes;
  --barrier.pending;
  barrier.write(kPlace, at);
  if (barrier.phase == phase) return;
  wait_until(kPlace, [round = machine.round] { return machine.round > round; });
}

// Until the phase of this parity is over.
inline void mbarrier_wait(const void* at, uint32_t parity) {
  constexpr const char* kPlace = "mbarrier.try_wait";
  wait_until(kPlace, [=] { return Mbarrier::read(kPlace, at).phase != parity; });
}

inline void named_barrier(unsigned threads, unsigned number) {
  constexpr const char* kPlace = "bar.sync";
  auto& barrier = hopper.named[number];
  if (barrier.arrived && barrier.threads != threads) {
    refuse(std::string(kPlace) + ": one barrier for two numbers of threads,");
  }
  barrier.threads = threads;
  if (hopper.trace) hopper.trace(int(machine.current->number / 128), kPlace);
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  wait_until(kPlace,
             [&barrier, before = barrier.generation] { return barrier.generation != before; });
}

inline void load_tile(const void* map, void* barrier, void* to, int32_t column, int32_t row) {
  if (reinterpret_cast<uintptr_t>(map) % 64) refuse("cp.async.bulk.tensor: a map off its place,");
  hopper.issue({*static_cast<const CUtensorMap*>(map), barrier, static_cast<unsigned char*>(to),
                column, row});
}

}  // namespace emulator

// As the driver's manual has it, for two dimensions of two-byte entries.
inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank,
                                       void* address, const cuuint64_t* sizes,
                                       const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* steps, CUtensorMapInterleave,
                                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                       CUtensorMapFloatOOBfill) {
  const cuuint32_t span = swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? 512 : 16u << swizzle;
  const bool is_valid =
      rank == 2 && reinterpret_cast<uintptr_t>(map) % 64 == 0 &&
      reinterpret_cast<uintptr_t>(address) % 16 == 0 && sizes[0] > 0 && sizes[1] > 0 &&
      sizes[0] <= cuuint64_t(1) << 32 && sizes[1] <= cuuint64_t(1) << 32 && strides[0] % 16 == 0 &&
      strides[0] < cuuint64_t(1) << 40 && strides[0] >= sizes[0] * 2 && box[0] > 0 && box[1] > 0 &&
      box[0] <= 256 && box[1] <= 256 && box[0] * 2 % 16 == 0 && box[0] * 2 <= span &&
      steps[0] == 1 && steps[1] == 1;
  if (!is_valid) return CUDA_ERROR_INVALID_VALUE;
  *map = {static_cast<const unsigned char*>(address),
          sizes[0],
          sizes[1],
          strides[0],
          box[0],
          box[1],
          swizzle};
  return CUDA_SUCCESS;
}

enum cudaDriverEntryPointQueryResult {
  cudaDriverEntryPointSuccess,
  cudaDriverEntryPointSymbolNotFound
};
constexpr unsigned long long cudaEnableDefault = 0;

namespace emulator {
inline bool has_driver = true;
}

inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                                    unsigned long long,
                                                    cudaDriverEntryPointQueryResult* found) {
  const bool is_there = emulator::has_driver && std::string(name) == "cuTensorMapEncodeTiled";
  *function = is_there ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  *found = is_there ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
