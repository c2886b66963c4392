// The fused product for Hopper: a producer warp brings rows by TMA, two warpgroups multiply them by
// wgmma, each half of the rows of a tile of dw; outer_wgrad.cu says what is summed. In a tile of
// 128 x 192 both of a warpgroup's sums, 96 registers a thread each, stay in registers. In a *wide*
// one of 128 x 256 the total, 128 KiB, is in shared memory, which leaves 4 stages of 32 rows, 24
// KiB each, where 5 of 64 rows, 40 KiB each, are else. Blocks are persistent: while a warpgroup
// squares or writes a tile, the next rows are on their way, and the other warpgroup multiplies.
//
// Rows of a neighbour that came with the last block of an item are overwritten with zeros in shared
// memory, in both operands, before they are multiplied: any length of segment works, at no cost to
// whole blocks. Compiled for sm_90a alone, with the headers of CUTLASS; run under emulation only.
#include <cuda.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/tensor.hpp>

#include "kernels/cuda/device.h"
#include "kernels/cuda/outer_walk.h"
#include "kernels/cuda/plans.h"
#include "kernels/outer_wgrad.h"

namespace gradnorm {
namespace {

namespace arch = cutlass::arch;
using cute::_1;
using cute::_16;
using cute::_2;
using cute::_64;
using cute::Int;

constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kConsumers = 2 * kGroup;
constexpr int kBox = 64;  // columns of what one TMA instruction brings

template <typename T, OuterKernel kKernel>
struct Kernel {
  static constexpr bool kIsWide = kKernel == OuterKernel::kHopperWide;
  static constexpr int kRows = kIsWide ? 32 : 64, kStages = kIsWide ? 4 : 5;
  static constexpr OuterTile kTile = kIsWide ? kHopperWideTile : kHopperTile;
  static constexpr int kBoxBytes = kRows * kBox * 2;  // rows of 128 bytes, swizzled within eight
  static constexpr int kBoxesD = kTile.d / kBox, kBoxesP = kTile.p / kBox;
  static constexpr int kStageBytes = (kBoxesD + kBoxesP) * kBoxBytes;

  using Element = std::conditional_t<std::is_same_v<T, Half>, cute::half_t, cute::bfloat16_t>;
  static constexpr CUtensorMapDataType kTma =
      std::is_same_v<T, Half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  using D = Int<kTile.d>;
  using P = Int<kTile.p>;
  using Atom =
      decltype(cute::GMMA::ss_op_selector<Element, Element, float, cute::Shape<_64, P, _16>,
                                          cute::GMMA::Major::MN, cute::GMMA::Major::MN>());
  using Multiply = decltype(cute::make_tiled_mma(Atom{}, cute::Layout<cute::Shape<_2, _1, _1>>{}));

  // [kTile.d or kTile.p, kRows] as TMA leaves it: box by box, each kRows x kBox, row after row.
  template <typename Columns>
  using Operand =
      decltype(cute::tile_to_shape(cute::GMMA::Layout_MN_SW128_Atom<Element>{},
                                   cute::Shape<Columns, Int<kRows>>{}, cute::Step<_2, _1>{}));

  struct Shared {
    alignas(1024) unsigned char stages[kStages][kStageBytes];
    float total[kIsWide ? kTile.d * kTile.p : 1];  // else it is in registers
    alignas(8) uint64_t full[kStages], empty[kStages];
    float squares[2][4];  // of a warpgroup's warps
  };
  static_assert(sizeof(Shared) <= 227 * 1024);
};

// TMA swizzles 16-byte pieces of 128 bytes by the row's place among eight; wgmma reads them so.
template <typename K>
constexpr bool is_as_tma_leaves_it() {
  using Layout = typename K::template Operand<typename K::P>;
  for (const int column : {0, 1, 8, 63, 64, 127, 128, int(K::kTile.p) - 1}) {
    for (const int row : {0, 1, 7, 8, K::kRows - 1}) {
      const int place = column / kBox * K::kRows * kBox + row * kBox + column % kBox;
      if (static_cast<int>(Layout{}.layout_b()(column, row)) != place) return false;
    }
  }
  return std::is_same_v<std::decay_t<decltype(Layout{}.layout_a())>, cute::Swizzle<3, 4, 3>>;
}
static_assert(is_as_tma_leaves_it<Kernel<BFloat16, OuterKernel::kHopper>>());
static_assert(is_as_tma_leaves_it<Kernel<BFloat16, OuterKernel::kHopperWide>>());

using Barrier = arch::ClusterBarrier;
using CopyBarrier = arch::ClusterTransactionBarrier;

struct Given {
  CUtensorMap x, g;
  OuterWalk walk;
  OuterProduct product;
  int tiles_d, tiles_p, splits;
  float* slabs;  // [splits, d, p], or null: dw itself
};

// A tile and a split, one after the other for each block.
template <typename K>
struct Work {
  int tile, split;

  __device__ Work(const Given& given, int number)
      : tile(number % tiles(given)), split(number / tiles(given)) {}

  __device__ static int tiles(const Given& given) { return given.tiles_d * given.tiles_p; }
  __device__ int at_d(const Given& given) const { return tile % given.tiles_d * int(K::kTile.d); }
  __device__ int at_p(const Given& given) const { return tile / given.tiles_d * int(K::kTile.p); }
  __device__ Blocks<K::kRows, int> blocks(const Given& given) const {
    const int64_t rows = given.product.rows;
    return {given.walk, first_item(given.walk, split, given.splits, rows),
            first_item(given.walk, split + 1, given.splits, rows)};
  }
};

template <typename K>
struct Stage {
  int index = 0;
  uint32_t phase = 0;
  __device__ void advance() {
    if (++index == K::kStages) {
      index = 0;
      phase ^= 1;
    }
  }
};

template <typename K>
__device__ void produce(const Given& given, typename K::Shared& shared) {
  Stage<K> stage;
  constexpr auto kOften = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
  const int count = Work<K>::tiles(given) * given.splits;
  for (int number = blockIdx.x; number < count; number += gridDim.x) {
    const Work<K> work(given, number);
    for (auto block = work.blocks(given); block.exists(); block.advance()) {
      Barrier::wait(&shared.empty[stage.index], stage.phase ^ 1);
      uint64_t* full = &shared.full[stage.index];
      CopyBarrier::arrive_and_expect_tx(full, K::kStageBytes);
      unsigned char* to = shared.stages[stage.index];
      for (int i = 0; i < K::kBoxesD; ++i, to += K::kBoxBytes) {
        cute::SM90_TMA_LOAD_2D::copy(&given.g, full, kOften, to, work.at_d(given) + i * kBox,
                                     block.row);
      }
      for (int i = 0; i < K::kBoxesP; ++i, to += K::kBoxBytes) {
        cute::SM90_TMA_LOAD_2D::copy(&given.x, full, kOften, to, work.at_p(given) + i * kBox,
                                     block.row);
      }
      stage.advance();
    }
  }
}

// Rows from `valid` on, of all boxes of the stage. Both warpgroups come here.
template <typename K>
__device__ inline void clear_rows(unsigned char* stage, int valid, int thread) {
  constexpr int kPieces = 128 / 16;
  const int pieces = (K::kRows - valid) * kPieces;
#pragma unroll 1
  for (int box = 0; box < K::kBoxesD + K::kBoxesP; ++box) {
    auto* from = reinterpret_cast<uint4*>(stage + box * K::kBoxBytes + valid * 128);
#pragma unroll 1
    for (int i = thread; i < pieces; i += kConsumers) from[i] = uint4{0, 0, 0, 0};
  }
  arch::fence_view_async_shared();
  arch::NamedBarrier::sync(kConsumers, 1);
}

template <typename Tensor>
__device__ inline void write_norm(const Tensor& sum, float* of_warps, int group, float* norm) {
  float square = 0;
#pragma unroll
  for (int i = 0; i < cute::size(sum); ++i) square += sum(i) * sum(i);
  square = sum_warp(square);
  const int thread = threadIdx.x % kGroup;
  arch::NamedBarrier::sync(kGroup, 2 + group);  // the last norm's are read
  if (thread % kWarp == 0) of_warps[thread / kWarp] = square;
  arch::NamedBarrier::sync(kGroup, 2 + group);
  if (thread == 0) *norm = (of_warps[0] + of_warps[1]) + (of_warps[2] + of_warps[3]);
}

// Writes the thread's entries to dw, or adds them to what is there.
template <typename K, typename Tensor>
__device__ inline void write_tile(const Tensor& sum, const Given& given, const Work<K>& work,
                                  int64_t output, bool adds) {
  const OuterProduct& product = given.product;
  float* dw = (given.slabs ? given.slabs : product.dw) +
              (given.slabs ? work.split : output) * product.d * product.p;
  const auto places =  // where in the tile an entry is
      typename K::Multiply()
          .get_thread_slice(threadIdx.x - kGroup)
          .partition_C(cute::make_identity_tensor(cute::Shape<typename K::D, typename K::P>{}));
#pragma unroll
  for (int i = 0; i < cute::size(sum); i += 2) {  // two neighbours of a row
    const int64_t row = work.at_d(given) + cute::get<0>(places(i));
    const int64_t column = work.at_p(given) + cute::get<1>(places(i));
    if (row >= product.d) continue;
    float* out = dw + row * product.p;
    float values[2] = {sum(i), sum(i + 1)};
    if (adds && column < product.p) values[0] += out[column];
    if (adds && column + 1 < product.p) values[1] += out[column + 1];
    store(out, column, product.p, values);
  }
}

// The blocks of rows up to the end of an inner sum, added to it; what is left is that block.
template <typename K, typename Tensor>
__device__ inline int64_t multiply(Tensor& inner, Blocks<K::kRows, int>& block, const Given& given,
                                   typename K::Shared& shared, Stage<K>& stage) {
  using Element = typename K::Element;
  const int thread = threadIdx.x - kGroup;
  typename K::Multiply mma;
  const auto mine = mma.get_thread_slice(thread);
  int item = -1, previous = -1;
  for (; item < 0; block.advance(), stage.advance()) {
    CopyBarrier::wait(&shared.full[stage.index], stage.phase);
    unsigned char* rows = shared.stages[stage.index];
    if (block.end - block.row < K::kRows) clear_rows<K>(rows, block.end - block.row, thread);
    const auto of_g = mine.make_fragment_A(
        mine.partition_A(cute::make_tensor(cute::make_smem_ptr(reinterpret_cast<Element*>(rows)),
                                           typename K::template Operand<typename K::D>{})));
    rows += K::kBoxesD * K::kBoxBytes;
    const auto of_x = mine.make_fragment_B(
        mine.partition_B(cute::make_tensor(cute::make_smem_ptr(reinterpret_cast<Element*>(rows)),
                                           typename K::template Operand<typename K::P>{})));
    cute::warpgroup_fence_operand(inner);
    cute::warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < cute::size<2>(of_g); ++k) {
      cute::gemm(mma, of_g(cute::_, cute::_, k), of_x(cute::_, cute::_, k), inner);
    }
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<1>();
    if (previous >= 0 && thread % kGroup == 0) Barrier::arrive(&shared.empty[previous]);
    previous = stage.index;
    if (block.ends_item() && given.walk.inner_column[block.item] >= 0) item = block.item;
  }
  cute::warpgroup_wait<0>();
  cute::warpgroup_fence_operand(inner);
  if (thread % kGroup == 0) Barrier::arrive(&shared.empty[previous]);
  return item;
}

// What the inner sums add up to: as many entries of each thread, 1 KiB apart in shared memory.
template <typename K, typename Tensor>
__device__ inline auto make_total(const Tensor& inner, typename K::Shared& shared) {
  if constexpr (K::kIsWide) {
    return cute::make_tensor(cute::make_smem_ptr(shared.total + (threadIdx.x - kGroup)),
                             cute::make_layout(cute::size(inner), Int<kConsumers>{}));
  } else {
    return cute::make_fragment_like(inner);
  }
}

template <typename K, bool kHasOuter>
__device__ void consume(const Given& given, typename K::Shared& shared) {
  const OuterWalk& walk = given.walk;
  const OuterProduct& product = given.product;
  const int group = threadIdx.x / kGroup - 1;
  const auto norm = [&](const Work<K>& work, int64_t column) {
    return product.norms + column * Work<K>::tiles(given) * 2 + work.tile * 2 + group;
  };
  auto inner = cute::partition_fragment_C(typename K::Multiply(),
                                          cute::Shape<typename K::D, typename K::P>{});
  auto outer = make_total<K>(inner, shared);  // the total of dw, where there is no outer sum
  const bool has_total = kHasOuter || product.dw;

  Stage<K> stage;
  const int count = Work<K>::tiles(given) * given.splits;
  for (int number = blockIdx.x; number < count; number += gridDim.x) {
    const Work<K> work(given, number);
    cute::clear(outer);
    bool is_written = false;
    for (auto block = work.blocks(given); block.exists();) {
      cute::clear(inner);
      const int64_t item = multiply<K>(inner, block, given, shared, stage);
      write_norm(inner, shared.squares[group], group, norm(work, walk.inner_column[item]));
      if (!has_total) continue;
      const float weight = !kHasOuter && walk.weight ? walk.weight[item] : 1.0f;
#pragma unroll
      for (int i = 0; i < cute::size(outer); ++i) outer(i) += weight * inner(i);
      if (!kHasOuter || walk.outer_column[item] < 0) continue;
      write_norm(outer, shared.squares[group], group, norm(work, walk.outer_column[item]));
      if (product.dw) {
        const int64_t output = walk.output ? walk.output[item] : 0;
        write_tile(outer, given, work, output, is_written && !walk.output);
      }
      is_written = true;
      cute::clear(outer);
    }
    if (product.dw && !walk.output && !(kHasOuter && is_written)) {
      write_tile(outer, given, work, 0, false);
    }
  }
}

template <typename K, bool kHasOuter>
__global__ void __launch_bounds__(kGroup + kConsumers, 1)
    outer_wgrad_hopper_kernel(const __grid_constant__ Given given) {
  auto& shared = *shared_memory<typename K::Shared>();
  if (threadIdx.x == 0) {
    for (int i = 0; i < K::kStages; ++i) {
      Barrier::init(&shared.full[i], 1);
      Barrier::init(&shared.empty[i], 2);
    }
    arch::fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < kGroup) {
    arch::warpgroup_reg_dealloc<24>();
    if (threadIdx.x == 0) produce<K>(given, shared);
  } else {
    arch::warpgroup_reg_alloc<240>();
    consume<K, kHasOuter>(given, shared);
  }
}

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's own function: libcuda is nowhere to be linked with on a machine without a GPU.
Encode encoder(const char* operation) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  check(operation, cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                    cudaEnableDefault, &found));
  if (found != cudaDriverEntryPointSuccess || !function) {
    throw std::runtime_error(std::string(operation) + ": the driver has no cuTensorMapEncodeTiled");
  }
  return reinterpret_cast<Encode>(function);
}

template <typename K, typename T>
CUtensorMap tensor_map(const char* operation, Encode encode, const T* rows, int64_t stride,
                       int64_t count, int64_t width) {
  CUtensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>((width + 7) / 8 * 8),
                              static_cast<cuuint64_t>(count)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride) * sizeof(T)};
  const cuuint32_t box[] = {kBox, K::kRows}, steps[] = {1, 1};
  const CUresult result =
      encode(&map, K::kTma, 2, const_cast<T*>(rows), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error(std::string(operation) + ": cuTensorMapEncodeTiled failed with " +
                             std::to_string(result));
  }
  return map;
}

template <OuterKernel kKernel, typename T>
void run(const T* x, const T* g, const OuterWalk& walk, const OuterProduct& product, int64_t units,
         int64_t multiprocessors, float* workspace, void* stream) {
  using K = Kernel<T, kKernel>;
  const char* operation = "outer_wgrad";
  if (product.rows > INT32_MAX || product.d > INT32_MAX || product.p > INT32_MAX) {
    throw std::runtime_error(std::string(operation) +
                             ": more rows or columns than TMA can address");
  }
  const auto plan = plan_outer(kKernel, walk, product, units, multiprocessors);
  const Encode encode = encoder(operation);
  const Given given = {
      tensor_map<K>(operation, encode, x, product.x_stride, product.rows, product.p),
      tensor_map<K>(operation, encode, g, product.g_stride, product.rows, product.d),
      walk,
      product,
      static_cast<int>(plan.tiles_d),
      static_cast<int>(plan.tiles_p),
      static_cast<int>(plan.splits),
      plan.workspace ? workspace : nullptr};
  const int64_t count = plan.tiles_d * plan.tiles_p * plan.splits;
  auto* kernel = walk.outer_column ? &outer_wgrad_hopper_kernel<K, true>
                                   : &outer_wgrad_hopper_kernel<K, false>;
  launch(operation, kernel, count < multiprocessors ? count : multiprocessors,
         dim3(kGroup + kConsumers), sizeof(typename K::Shared), stream, given);
  if (plan.workspace) sum_slabs(workspace, plan.splits, product, stream);
}

}  // namespace

template <typename T>
void outer_wgrad_hopper(OuterKernel kernel, const T* x, const T* g, const OuterWalk& walk,
                        const OuterProduct& product, int64_t units, int64_t multiprocessors,
                        float* workspace, void* stream) {
  auto* chosen = kernel == OuterKernel::kHopperWide ? &run<OuterKernel::kHopperWide, T>
                                                    : &run<OuterKernel::kHopper, T>;
  chosen(x, g, walk, product, units, multiprocessors, workspace, stream);
}

template void outer_wgrad_hopper<Half>(OuterKernel, const Half*, const Half*, const OuterWalk&,
                                       const OuterProduct&, int64_t, int64_t, float*, void*);
template void outer_wgrad_hopper<BFloat16>(OuterKernel, const BFloat16*, const BFloat16*,
                                           const OuterWalk&, const OuterProduct&, int64_t, int64_t,
                                           float*, void*);

}  // namespace gradnorm
