// The CUDA kernels as torch operators, beside torch_ops.cpp. What lies on the device is not looked
// at: offsets, ids and columns are taken at their word. Workspace is torch's, freed in stream
// order.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "bindings/tensors.h"
#include "kernels/cuda/driver.h"
#include "kernels/lookup_wgrad.h"
#include "kernels/outer_wgrad.h"
#include "kernels/per_sample_wgrad.h"
#include "kernels/segment_scale_grad.h"
#include "kernels/segment_std.h"
#include "kernels/segment_sum.h"
#include "kernels/segments.h"

// Only a CUDA build of torch has this. Weak, so that one build of ours loads in a CPU build as
// well.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);

namespace {
using namespace tensors;
using gradnorm::Accumulator;

// The device of a tensor made current, and torch's stream on it.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// `size` entries beside `like`, kept until the tensor goes.
template <typename T>
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t size)
      : memory_(torch::stable::new_empty(like, {size}, kType<T>)) {}
  T* data() { return static_cast<T*>(memory_.mutable_data_ptr()); }

 private:
  Tensor memory_;
};

const int64_t* integers_of(const Tensor& tensor, int64_t size) {
  return vector_of<int64_t>(tensor, size, ScalarType::Long);
}

gradnorm::Segments segments_of(const Tensor& walk, const Tensor& columns,
                               const std::optional<Tensor>& outputs) {
  gradnorm::Segments segments = {};
  segments.count = walk.numel();
  segments.walk = integers_of(walk, segments.count);
  segments.levels = columns.size(0);
  segments.columns = integers_of(columns, segments.levels * segments.count);
  segments.outputs = vector_of<int64_t>(outputs, segments.count, ScalarType::Long);
  return segments;
}

void segment_scale_grad_cuda(const Tensor& x, const Tensor& g, const std::optional<Tensor>& shift,
                             const std::optional<Tensor>& scale, const Tensor& offsets,
                             Tensor& out) {
  const OnDevice device(x);
  for_row_type(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    const int64_t rows = x.size(0), width = x.size(1), segments = offsets.numel() - 1;
    STD_TORCH_CHECK(g.dim() == 2 && g.size(1) == width, "gradnorm: x and g of another width");
    const T *x_rows = rows_of<T>(x, rows), *g_rows = rows_of<T>(g, rows);
    Workspace<A> workspace(
        out, gradnorm::segment_scale_grad_workspace(x_rows, x.stride(0), g_rows, g.stride(0), rows,
                                                    width, segments));
    gradnorm::segment_scale_grad_cuda(
        x_rows, x.stride(0), g_rows, g.stride(0), rows, width, vector_of<A>(shift, rows, kType<A>),
        vector_of<A>(scale, rows, kType<A>), integers_of(offsets, segments + 1), segments,
        out_of<A>(out, segments * width), workspace.data(), device.stream());
  });
}

void segment_sum_cuda(const Tensor& g, const Tensor& offsets, Tensor& out) {
  const OnDevice device(g);
  for_row_type(g, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    const int64_t rows = g.size(0), width = g.size(1), segments = offsets.numel() - 1;
    const T* g_rows = rows_of<T>(g, rows);
    Workspace<A> workspace(
        out, gradnorm::segment_sum_workspace(g_rows, g.stride(0), rows, width, segments));
    gradnorm::segment_sum_cuda(g_rows, g.stride(0), rows, width, integers_of(offsets, segments + 1),
                               segments, out_of<A>(out, segments * width), workspace.data(),
                               device.stream());
  });
}

void per_sample_wgrad_cuda(const Tensor& sums, const Tensor&, const Tensor& walk,
                           const Tensor& columns, const std::optional<Tensor>& weight,
                           std::optional<Tensor> dw, Tensor& sqnorm) {
  const OnDevice device(sums);
  for_type(sums, [&](auto zero) {
    using T = decltype(zero);
    const int64_t count = sums.size(0), width = sums.size(1), norms = sqnorm.numel();
    const auto segments = segments_of(walk, columns, std::nullopt);
    STD_TORCH_CHECK(segments.count == count, "gradnorm: sums must be [segments, width]");
    const T* rows = vector_of<T>(sums, count * width, kType<T>);
    Workspace<T> workspace(
        sums, gradnorm::per_sample_wgrad_workspace(rows, width, segments, norms, dw.has_value()));
    torch::stable::zero_(sqnorm);
    gradnorm::per_sample_wgrad_cuda(rows, width, segments, vector_of<T>(weight, count, kType<T>),
                                    dw ? out_of<T>(*dw, width) : nullptr, out_of<T>(sqnorm, norms),
                                    norms, workspace.data(), device.stream());
  });
}

void lookup_wgrad_sorted_cuda(const Tensor& ids, const Tensor& place,
                              const std::optional<Tensor>& row, const Tensor& segment,
                              const Tensor& offsets, const Tensor& g, const Tensor& walk,
                              const Tensor& columns, const std::optional<Tensor>& outputs,
                              const std::optional<Tensor>& weight, int64_t padding_idx,
                              std::optional<Tensor> dw, Tensor& sqnorm) {
  const OnDevice device(g);
  for_row_type(g, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    const int64_t rows = g.size(0), d = g.size(1), vocabulary = dw ? dw->size(1) : 0;
    const auto segments = segments_of(walk, columns, outputs);
    const gradnorm::SortedLookup lookup = {integers_of(ids, rows),
                                           integers_of(place, rows),
                                           vector_of<int64_t>(row, rows, ScalarType::Long),
                                           integers_of(segment, rows),
                                           integers_of(offsets, segments.count + 1),
                                           rows};
    const T* g_rows = rows_of<T>(g, rows);
    Workspace<A> workspace(
        sqnorm, gradnorm::lookup_wgrad_workspace(g_rows, g.stride(0), rows, d, segments));
    gradnorm::lookup_wgrad_cuda(lookup, g_rows, g.stride(0), d, vocabulary, segments,
                                vector_of<A>(weight, segments.count, kType<A>), padding_idx,
                                dw ? out_of<A>(*dw, dw->size(0) * vocabulary * d) : nullptr,
                                out_of<A>(sqnorm, sqnorm.numel()), workspace.data(),
                                device.stream());
  });
}

void outer_fused_cuda(const Tensor& x, const Tensor& g, const Tensor& begin, const Tensor& end,
                      const Tensor& unit, const Tensor& inner, const std::optional<Tensor>& outer,
                      const std::optional<Tensor>& output, const std::optional<Tensor>& weight,
                      int64_t p, int64_t d, int64_t units, int64_t method, std::optional<Tensor> dw,
                      Tensor& norms) {
  using gradnorm::OuterKernel;
  const OnDevice device(x);
  const auto kernel = static_cast<OuterKernel>(method);
  const int64_t items = begin.numel(), rows = x.size(0);
  const gradnorm::OuterWalk walk = {items,
                                    integers_of(begin, items),
                                    integers_of(end, items),
                                    integers_of(unit, items),
                                    integers_of(inner, items),
                                    vector_of<int64_t>(outer, items, ScalarType::Long),
                                    vector_of<int64_t>(output, items, ScalarType::Long),
                                    vector_of<float>(weight, items, ScalarType::Float)};
  STD_TORCH_CHECK(x.size(1) >= p && x.size(1) % 8 == 0 && g.size(1) >= d && g.size(1) % 8 == 0 &&
                      x.stride(0) % 8 == 0 && g.stride(0) % 8 == 0,
                  "gradnorm: x and g must be padded to multiples of 8 columns");
  STD_TORCH_CHECK(norms.dim() == 2 && norms.size(1) == gradnorm::outer_parts(kernel, d, p),
                  "gradnorm: norms must be [columns, parts]");
  const gradnorm::OuterProduct product = {x.stride(0),
                                          g.stride(0),
                                          rows,
                                          p,
                                          d,
                                          dw ? out_of<float>(*dw, dw->size(0) * d * p) : nullptr,
                                          out_of<float>(norms, norms.numel())};
  const int64_t multiprocessors = gradnorm::multiprocessor_count(x.get_device_index());
  Workspace<float> workspace(
      norms, gradnorm::outer_workspace(kernel, walk, product, units, multiprocessors));
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const T *x_rows = rows_of<T>(x, rows), *g_rows = rows_of<T>(g, rows);
    if (kernel == OuterKernel::kAmpere) {
      gradnorm::outer_wgrad_ampere(x_rows, g_rows, walk, product, units, multiprocessors,
                                   workspace.data(), device.stream());
    } else {
      gradnorm::outer_wgrad_hopper(kernel, x_rows, g_rows, walk, product, units, multiprocessors,
                                   workspace.data(), device.stream());
    }
  };
  if (x.scalar_type() == ScalarType::Half) {
    run(gradnorm::Half());
  } else {
    run(gradnorm::BFloat16());
  }
}

void segment_std_cuda(const Tensor& values, const Tensor& ids, int64_t ddof, Tensor& mean,
                      Tensor& std, Tensor& count, Tensor& low, Tensor& high) {
  const OnDevice device(values);
  for_type(values, [&](auto zero) {
    using T = decltype(zero);
    const int64_t n = values.numel();
    gradnorm::segment_std_cuda(vector_of<T>(values, n, kType<T>), integers_of(ids, n), n,
                               count.numel(), ddof, segment_std_out<T>(mean, std, count, low, high),
                               device.stream());
  });
}

void segment_std_sorted_cuda(const Tensor& values, const Tensor& order, const Tensor& offsets,
                             int64_t ddof, Tensor& mean, Tensor& std, Tensor& count, Tensor& low,
                             Tensor& high) {
  const OnDevice device(values);
  for_type(values, [&](auto zero) {
    using T = decltype(zero);
    const int64_t n = values.numel(), segments = count.numel();
    gradnorm::segment_std_sorted_cuda(vector_of<T>(values, n, kType<T>), integers_of(order, n),
                                      integers_of(offsets, segments + 1), n, segments, ddof,
                                      segment_std_out<T>(mean, std, count, low, high),
                                      device.stream());
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gradnorm, CUDA, m) {
  m.impl("outer_fused", TORCH_BOX(&outer_fused_cuda));
  m.impl("segment_scale_grad", TORCH_BOX(&segment_scale_grad_cuda));
  m.impl("segment_sum", TORCH_BOX(&segment_sum_cuda));
  m.impl("per_sample_wgrad", TORCH_BOX(&per_sample_wgrad_cuda));
  m.impl("lookup_wgrad_sorted", TORCH_BOX(&lookup_wgrad_sorted_cuda));
  m.impl("segment_std", TORCH_BOX(&segment_std_cuda));
  m.impl("segment_std_sorted", TORCH_BOX(&segment_std_sorted_cuda));
}
