// What both bindings need of a tensor: its memory, after a look at its dtype, size and strides.
//
// The bindings are the only files that know torch, through its stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <type_traits>

#include "kernels/floats.h"
#include "kernels/segment_std.h"

namespace tensors {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
constexpr ScalarType kType = std::is_same_v<T, float>            ? ScalarType::Float
                             : std::is_same_v<T, double>         ? ScalarType::Double
                             : std::is_same_v<T, gradnorm::Half> ? ScalarType::Half
                                                                 : ScalarType::BFloat16;

// Runs body<T> for the element type of `tensor`.
template <typename Body>
void for_type(const Tensor& tensor, const Body& body) {
  if (tensor.scalar_type() == ScalarType::Float) {
    body(float());
  } else {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Double, "gradnorm: float32 or float64");
    body(double());
  }
}

// The same where half precision is taken as well.
template <typename Body>
void for_row_type(const Tensor& tensor, const Body& body) {
  if (tensor.scalar_type() == ScalarType::Half) {
    body(gradnorm::Half());
  } else if (tensor.scalar_type() == ScalarType::BFloat16) {
    body(gradnorm::BFloat16());
  } else {
    for_type(tensor, body);
  }
}

// [rows, width] with inner stride 1.
template <typename T>
const T* rows_of(const Tensor& tensor, int64_t rows) {
  STD_TORCH_CHECK(tensor.scalar_type() == kType<T> && tensor.dim() == 2 && tensor.size(0) == rows &&
                      (tensor.size(1) <= 1 || tensor.stride(1) == 1),
                  "gradnorm: rows of another dtype, number or stride");
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
const T* vector_of(const std::optional<Tensor>& tensor, int64_t size, ScalarType type) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(
      tensor->scalar_type() == type && tensor->numel() == size && tensor->is_contiguous(),
      "gradnorm: a vector of another dtype, size or stride");
  return static_cast<const T*>(tensor->const_data_ptr());
}

template <typename T>
T* out_of(Tensor& tensor, int64_t size, ScalarType type = kType<T>) {
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.numel() == size && tensor.is_contiguous(),
                  "gradnorm: an output of another dtype, size or stride");
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename T>
gradnorm::SegmentStd<T> segment_std_out(Tensor& mean, Tensor& std, Tensor& count, Tensor& low,
                                        Tensor& high) {
  const int64_t segments = count.numel();
  return {out_of<T>(mean, segments), out_of<T>(std, segments),
          out_of<int64_t>(count, segments, ScalarType::Long), out_of<T>(low, segments),
          out_of<T>(high, segments)};
}

}  // namespace tensors
