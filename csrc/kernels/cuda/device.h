// What all CUDA kernels share: wide loads, sums over a warp, and a launch whose failure says which
// operation failed. Valid C++ as well, given the <cuda_runtime.h> of tests/cpp/cuda.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels/floats.h"

namespace gradnorm {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(BFloat16 value) {
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}
__device__ inline float widen(Half value) {
#ifdef __CUDACC__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  return emulator::widen_half(value.bits);
#endif
}

// kSize neighbours, loaded and stored as one.
template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Vector {
  T values[kSize];
};

// row[column] and on; what lies beyond the width is not read, and zero.
template <int kSize, typename T>
__device__ inline Vector<T, kSize> load(const T* row, int64_t column, int64_t width) {
  if (column + kSize <= width) {
    return *reinterpret_cast<const Vector<T, kSize>*>(row + column);
  }
  Vector<T, kSize> vector = {};
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if (column + i < width) vector.values[i] = row[column + i];
  }
  return vector;
}

// As load; in pieces of 16 bytes where they lie on multiples of 16.
template <int kSize, typename T>
__device__ inline void store(T* row, int64_t column, int64_t width, const T (&values)[kSize]) {
  constexpr int kPiece = sizeof(T) * kSize >= 16 ? 16 / sizeof(T) : kSize;
  T* out = row + column;
  if (column + kSize <= width && reinterpret_cast<uintptr_t>(out) % (sizeof(T) * kPiece) == 0) {
#pragma unroll
    for (int i = 0; i < kSize; i += kPiece) {
      Vector<T, kPiece> piece;
#pragma unroll
      for (int j = 0; j < kPiece; ++j) piece.values[j] = values[i + j];
      *reinterpret_cast<Vector<T, kPiece>*>(out + i) = piece;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if (column + i < width) out[i] = values[i];
  }
}

// The same value in every lane, in the same order at every call.
template <typename V, typename Combine>
__device__ inline V combine_warp(V value, const Combine& combine) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

template <typename V>
__device__ inline V sum_warp(V value) {
  return combine_warp(value, [](V a, V b) { return a + b; });
}

template <typename V>
__device__ inline V* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(1024) unsigned char memory[];
  return reinterpret_cast<V*>(memory);
#else
  return reinterpret_cast<V*>(emulator::shared_memory());
#endif
}

// The number of workers that give every multiprocessor of a large card enough to do.
constexpr int64_t kFillsAGpu = 2112;  // 16 for each of 132

inline bool is_vector_aligned(const void* pointer, int64_t stride_bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride_bytes % 16 == 0;
}

inline void check(const char* operation, cudaError_t error) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // told; torch should not find it again
    throw std::runtime_error(std::string(operation) + ": " + cudaGetErrorString(error));
  }
}

template <typename... Parameters, typename... Arguments>
void launch(const char* operation, void (*kernel)(Parameters...), int64_t blocks, dim3 threads,
            size_t shared_bytes, void* stream, Arguments... arguments) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) {
    throw std::runtime_error(std::string(operation) + ": more blocks than a launch can have");
  }
  if (shared_bytes > 48 * 1024) {
    check(operation, cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(shared_bytes)));
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  check(operation, cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

}  // namespace gradnorm
