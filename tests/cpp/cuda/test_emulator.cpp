// The emulator itself: kernels that are wrong in one way each are found out, and that way is named.
#include <cuda_runtime.h>

#include "emulated.h"

namespace {

void expect(bool ok, const std::string& what) {
  std::printf("%s %s\n", ok ? "ok" : "FAIL", what.c_str());
  check::failures += !ok;
}

// Reverses a block's values; the barrier between writing and reading is what makes it right.
template <bool kHasBarrier>
__global__ void reverse_kernel(const float* in, float* out) {
  float* shared = gradnorm::shared_memory<float>();
  shared[threadIdx.x] = in[threadIdx.x];
  if (kHasBarrier) __syncthreads();
  out[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

// Each thread overwrites what its neighbour may not have read yet.
template <bool kHasBarrier>
__global__ void rotate_kernel(const float* in, float* out) {
  float* shared = gradnorm::shared_memory<float>();
  shared[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  const float next = shared[(threadIdx.x + 1) % blockDim.x];
  if (kHasBarrier) __syncthreads();
  shared[threadIdx.x] = 2 * next;
  out[threadIdx.x] = next;
}

__global__ void add_blocks_kernel(const float*, float* out) {
  if (threadIdx.x == 0) out[0] = 2 * out[0] + float(blockIdx.x);
}

__global__ void divergent_kernel(const float*, float* out) {
  if (threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void two_barriers_kernel(const float*, float* out) {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 0;
}

__global__ void half_a_warp_kernel(const float* in, float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 1);
}

__global__ void outside_the_mask_kernel(const float* in, float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, in[threadIdx.x], 16);
}

__global__ void shuffle_kernel(const float* in, float* out) {
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 3);
}

__global__ void beyond_kernel(const float* in, float* out) { out[threadIdx.x] = in[threadIdx.x]; }

constexpr int kSize = 64;

std::vector<float> run(void (*kernel)(const float*, float*), int64_t blocks = 1) {
  const check::Fenced<float> in(kSize), out(kSize);
  for (int i = 0; i < kSize; ++i) in[i] = float(i + 1), out[i] = 0;
  gradnorm::launch("test", kernel, blocks, dim3(kSize), kSize * sizeof(float), nullptr,
                   static_cast<const float*>(in.data()), out.data());
  return out.values();
}

bool depends_on_order(void (*kernel)(const float*, float*), int64_t blocks = 1) {
  std::vector<std::vector<float>> found;
  for (const auto order : {emulator::Order::kForward, emulator::Order::kBackward}) {
    emulator::order = order;
    found.push_back(run(kernel, blocks));
  }
  emulator::order = emulator::Order::kForward;
  return std::memcmp(found[0].data(), found[1].data(), kSize * sizeof(float)) != 0;
}

bool is_refused(void (*kernel)(const float*, float*), const std::string& with) {
  try {
    run(kernel);
  } catch (const emulator::Refused& refused) {
    std::printf("   %s\n", refused.what());
    return std::string(refused.what()).find(with) != std::string::npos;
  }
  return false;
}

}  // namespace

int main() {
  expect(!depends_on_order(reverse_kernel<true>), "a block reverses its values");
  expect(run(reverse_kernel<true>)[0] == kSize, "and rightly");
  expect(depends_on_order(reverse_kernel<false>), "a missing barrier before reading is seen");
  expect(!depends_on_order(rotate_kernel<true>), "a block rotates its values");
  expect(depends_on_order(rotate_kernel<false>), "a missing barrier before writing is seen");
  expect(depends_on_order(add_blocks_kernel, 3), "blocks that race for a sum are seen");
  expect(is_refused(divergent_kernel, "a barrier that not all threads reach"), "divergence");
  expect(is_refused(two_barriers_kernel, "threads wait at two barriers"), "two barriers");
  expect(is_refused(half_a_warp_kernel, "not all of its lanes reach"), "half a warp");
  expect(is_refused(outside_the_mask_kernel, "outside the mask"), "a lane outside the mask");
  expect(run(shuffle_kernel)[0] == 4 && run(shuffle_kernel)[33] == 35, "a shuffle");

  for (const double value : {0.0, 1.0, -2.5, 65504.0, 0x1p-24, -0x1.8p-16, 0.333251953125}) {
    expect(check::value_of(check::rounded<check::Half>(value)) == value, "a half is what it was");
  }

  emulator::next_error = cudaErrorNoKernelImage;
  try {
    run(beyond_kernel);
    expect(false, "a launch that fails is an error");
  } catch (const std::runtime_error& error) {
    expect(std::string(error.what()) ==
               "test: no kernel image is available for execution on the device",
           "a launch that fails is an error");
  }
  expect(cudaGetLastError() == cudaSuccess, "and nobody else's");
  return check::failures != 0;
}
