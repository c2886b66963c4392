#include "kernels/cuda/device.h"
#include "kernels/cuda/driver.h"

namespace gradnorm {
namespace {

__global__ void nothing_kernel() {}

}  // namespace

std::string cuda_problem() {
  int devices = 0;
  cudaError_t error = cudaGetDeviceCount(&devices);
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, &nothing_kernel);
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // told; torch should not find it again
  return cudaGetErrorString(error);
}

int multiprocessor_count(int device) {
  int count = 0;
  check("outer_wgrad", cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

}  // namespace gradnorm
