// What the headers of CUTLASS, as C++, want of CUDA's own: every CUDA header that they include is
// this one (CMakeLists.txt). Nothing here computes with these types, so that names are enough.
#pragma once

#include <cuda_runtime.h>

#include <cassert>
#include <cstddef>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>

#include "hopper.h"

namespace cuda {
namespace std = ::std;
}

#define TOOLKIT_VECTORS(type, name)         \
  struct alignas(8) name##2 { type x, y; }; \
  struct alignas(16) name##4 { type x, y, z, w; };
TOOLKIT_VECTORS(int, int)
TOOLKIT_VECTORS(unsigned, uint)
TOOLKIT_VECTORS(float, float)
TOOLKIT_VECTORS(double, double)
TOOLKIT_VECTORS(long, long)
TOOLKIT_VECTORS(unsigned long, ulong)
TOOLKIT_VECTORS(long long, longlong)
TOOLKIT_VECTORS(unsigned long long, ulonglong)
#undef TOOLKIT_VECTORS

struct half {
  uint16_t x;
};
struct half2 {
  half x, y;
};
struct __nv_bfloat16 {
  uint16_t x;
};
using __half_raw = half;
using __nv_bfloat16_raw = __nv_bfloat16;
float __half2float(half value);
half __float2half(float value);

using cuFloatComplex = float2;
using cuDoubleComplex = double2;
float cuCrealf(cuFloatComplex value);
float cuCimagf(cuFloatComplex value);
double cuCreal(cuDoubleComplex value);
double cuCimag(cuDoubleComplex value);
cuFloatComplex make_cuFloatComplex(float real, float imaginary);
cuDoubleComplex make_cuDoubleComplex(double real, double imaginary);

inline uint32_t __cvta_generic_to_shared(const void* pointer) {
  return emulator::address_of(pointer);
}
#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1
