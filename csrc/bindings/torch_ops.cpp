// The CPU kernels as torch operators, through its stable ABI. Schemas live in
// gradnorm_ext/operations.py, checks on what users pass in gradnorm_ext/ops.py; those here only
// keep the kernels inside their memory.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "bindings/tensors.h"
#include "kernels/host.h"
#include "kernels/logit_gradient_rates.h"
#include "kernels/logit_scores.h"
#include "kernels/lookup_wgrad.h"
#include "kernels/outer_sqnorm.h"
#include "kernels/outer_wgrad.h"
#include "kernels/per_sample_wgrad.h"
#include "kernels/segment_scale_grad.h"
#include "kernels/segment_std.h"
#include "kernels/segment_sum.h"
#include "kernels/segments.h"

namespace {
using namespace tensors;

class Handle {  // of a torch tensor over memory that somebody else owns
 public:
  template <typename T>
  explicit Handle(const gradnorm::Matrix<T>& matrix) {
    static const int32_t cpu = aoti_torch_device_type_cpu();
    static const int32_t dtype = std::is_same_v<std::remove_const_t<T>, float>
                                     ? aoti_torch_dtype_float32()
                                     : aoti_torch_dtype_float64();
    const int64_t sizes[] = {matrix.rows, matrix.columns};
    const int64_t strides[] = {matrix.row_stride, matrix.column_stride};
    void* data = const_cast<void*>(static_cast<const void*>(matrix.data));
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_create_tensor_from_blob(data, 2, sizes, strides, 0, dtype, cpu, 0, &handle_));
  }
  Handle(const Handle&) = delete;
  ~Handle() { aoti_torch_delete_tensor_object(handle_); }
  operator AtenTensorHandle() const { return handle_; }

 private:
  AtenTensorHandle handle_ = nullptr;
};

// Torch's matrix product and threads.
template <typename T>
gradnorm::Host<T> torch_host() {
  gradnorm::Host<T> host;
  host.multiply = [](const gradnorm::Matrix<const T>& a, const gradnorm::Matrix<const T>& b,
                     const gradnorm::Matrix<T>& c, double alpha, double beta) {
    const Handle left(a), right(b), out(c);
    if (alpha == 1 && beta == 0) {
      TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out, left, right));
    } else {
      TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out, out, left, right, beta, alpha));
    }
  };
  host.parallel_ranges = [](int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
    TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, 1, body, context));
  };
  host.threads = torch::stable::get_num_threads();
  return host;
}

bool all_below(const int64_t* values, int64_t n, int64_t limit) {
  return std::all_of(values, values + n, [=](int64_t v) { return 0 <= v && v < limit; });
}

const int64_t* offsets_of(const Tensor& tensor, int64_t rows) {
  const int64_t* offsets = vector_of<int64_t>(tensor, tensor.numel(), ScalarType::Long);
  const int64_t n = tensor.numel();
  STD_TORCH_CHECK(
      n > 0 && offsets[0] == 0 && offsets[n - 1] == rows && std::is_sorted(offsets, offsets + n),
      "gradnorm: offsets must rise from 0 to the number of rows");
  return offsets;
}

int64_t last_of(const Tensor& offsets) {
  return vector_of<int64_t>(offsets, offsets.numel(), ScalarType::Long)[offsets.numel() - 1];
}

gradnorm::Segments segments_of(const Tensor& offsets, const Tensor& walk, const Tensor& columns,
                               const std::optional<Tensor>& outputs, int64_t rows,
                               int64_t n_columns, int64_t n_outputs) {
  gradnorm::Segments segments;
  const int64_t count = segments.count = offsets.numel() - 1;
  segments.offsets = offsets_of(offsets, rows);
  segments.walk = vector_of<int64_t>(walk, count, ScalarType::Long);
  segments.levels = columns.size(0);
  segments.columns = vector_of<int64_t>(columns, segments.levels * count, ScalarType::Long);
  segments.outputs = vector_of<int64_t>(outputs, count, ScalarType::Long);
  STD_TORCH_CHECK(all_below(segments.walk, count, count) &&
                      all_below(segments.columns, segments.levels * count, n_columns) &&
                      n_columns >= count &&
                      (!segments.outputs || all_below(segments.outputs, count, n_outputs)),
                  "gradnorm: walk, columns or outputs out of range");
  return segments;
}

void outer_sqnorm_cpu(const Tensor& x, const Tensor& g, const Tensor& offsets, Tensor& sqnorm) {
  for_type(x, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = x.size(0), segments = offsets.numel() - 1;
    gradnorm::outer_sqnorm_cpu(rows_of<T>(x, rows), x.stride(0), rows_of<T>(g, rows), g.stride(0),
                               x.size(1), g.size(1), offsets_of(offsets, rows), segments,
                               out_of<T>(sqnorm, segments), torch_host<T>());
  });
}

void outer_wgrad_cpu(const Tensor& x, const Tensor& g, const Tensor& offsets, const Tensor& walk,
                     const Tensor& columns, const std::optional<Tensor>& outputs,
                     const std::optional<Tensor>& weight, std::optional<Tensor> dw, Tensor& sqnorm,
                     bool segment_norms) {
  for_type(x, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = x.size(0), p = x.size(1), d = g.size(1);
    const int64_t n_outputs = dw ? dw->size(0) : INT64_MAX;
    const auto segments =
        segments_of(offsets, walk, columns, outputs, rows, sqnorm.numel(), n_outputs);
    STD_TORCH_CHECK(!dw || outputs || n_outputs >= 1, "gradnorm: dw must be [outputs, d, p]");
    gradnorm::outer_wgrad_cpu(rows_of<T>(x, rows), x.stride(0), rows_of<T>(g, rows), g.stride(0), p,
                              d, segments, vector_of<T>(weight, segments.count, kType<T>),
                              dw ? out_of<T>(*dw, n_outputs * d * p) : nullptr,
                              out_of<T>(sqnorm, sqnorm.numel()), segment_norms, torch_host<T>());
  });
}

// windows: image, channels, then positions, step, kernel and spread, three of each.
void im2col_wgrad_cpu(const Tensor& images, const Tensor& windows, const Tensor& g,
                      const Tensor& offsets, const Tensor& walk, const Tensor& columns,
                      const std::optional<Tensor>& outputs, const std::optional<Tensor>& weight,
                      std::optional<Tensor> dw, Tensor& sqnorm) {
  for_type(images, [&](auto zero) {
    using T = decltype(zero);
    gradnorm::Im2col seen;
    const int64_t* sizes = vector_of<int64_t>(windows, 14, ScalarType::Long);
    seen.image = sizes[0];
    seen.channels = sizes[1];
    for (int i = 0; i < gradnorm::Im2col::kDimensions; ++i) {
      seen.positions[i] = sizes[2 + i];
      seen.step[i] = sizes[5 + i];
      seen.kernel[i] = sizes[8 + i];
      seen.spread[i] = sizes[11 + i];
    }
    STD_TORCH_CHECK(seen.fits(), "gradnorm: windows must lie inside of their image");
    const int64_t rows = images.numel() / seen.image * seen.rows(), d = g.size(1);
    const int64_t n_outputs = dw ? dw->size(0) : INT64_MAX;
    const auto segments =
        segments_of(offsets, walk, columns, outputs, rows, sqnorm.numel(), n_outputs);
    STD_TORCH_CHECK(!dw || outputs || n_outputs >= 1, "gradnorm: dw must be [outputs, d, p]");
    gradnorm::im2col_wgrad_cpu(vector_of<T>(images, images.numel(), kType<T>), seen,
                               rows_of<T>(g, rows), g.stride(0), d, segments,
                               vector_of<T>(weight, segments.count, kType<T>),
                               dw ? out_of<T>(*dw, n_outputs * d * seen.columns()) : nullptr,
                               out_of<T>(sqnorm, sqnorm.numel()), true, torch_host<T>());
  });
}

void lookup_wgrad_cpu(const Tensor& ids, const Tensor& g, const Tensor& offsets, const Tensor& walk,
                      const Tensor& columns, const std::optional<Tensor>& outputs,
                      const std::optional<Tensor>& weight, int64_t padding_idx,
                      std::optional<Tensor> dw, Tensor& sqnorm) {
  for_type(g, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = g.size(0), d = g.size(1);
    const int64_t n_outputs = dw ? dw->size(0) : INT64_MAX;
    const int64_t vocabulary = dw ? dw->size(1) : INT64_MAX;
    const auto segments =
        segments_of(offsets, walk, columns, outputs, rows, sqnorm.numel(), n_outputs);
    const int64_t* id = vector_of<int64_t>(ids, rows, ScalarType::Long);
    STD_TORCH_CHECK(all_below(id, rows, vocabulary), "gradnorm: ids out of range");
    STD_TORCH_CHECK(!dw || outputs || n_outputs >= 1, "gradnorm: dw must be [outputs, V, d]");
    gradnorm::lookup_wgrad_cpu(id, rows_of<T>(g, rows), g.stride(0), d, vocabulary, segments,
                               vector_of<T>(weight, segments.count, kType<T>), padding_idx,
                               dw ? out_of<T>(*dw, n_outputs * vocabulary * d) : nullptr,
                               out_of<T>(sqnorm, sqnorm.numel()), torch_host<T>());
  });
}

void segment_scale_grad_cpu(const Tensor& x, const Tensor& g, const std::optional<Tensor>& shift,
                            const std::optional<Tensor>& scale, const Tensor& offsets,
                            Tensor& out) {
  for_type(x, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = x.size(0), width = x.size(1), segments = offsets.numel() - 1;
    STD_TORCH_CHECK(g.dim() == 2 && g.size(1) == width, "gradnorm: x and g of another width");
    gradnorm::segment_scale_grad_cpu(rows_of<T>(x, rows), x.stride(0), rows_of<T>(g, rows),
                                     g.stride(0), width, vector_of<T>(shift, rows, kType<T>),
                                     vector_of<T>(scale, rows, kType<T>), offsets_of(offsets, rows),
                                     segments, out_of<T>(out, segments * width), torch_host<T>());
  });
}

void segment_sum_cpu(const Tensor& g, const Tensor& offsets, Tensor& out) {
  for_type(g, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = g.size(0), width = g.size(1), segments = offsets.numel() - 1;
    gradnorm::segment_sum_cpu(rows_of<T>(g, rows), g.stride(0), width, offsets_of(offsets, rows),
                              segments, out_of<T>(out, segments * width), torch_host<T>());
  });
}

void per_sample_wgrad_cpu(const Tensor& sums, const Tensor& offsets, const Tensor& walk,
                          const Tensor& columns, const std::optional<Tensor>& weight,
                          std::optional<Tensor> dw, Tensor& sqnorm) {
  for_type(sums, [&](auto zero) {
    using T = decltype(zero);
    const int64_t count = sums.size(0), width = sums.size(1);
    const int64_t rows = offsets.numel() > 0 ? last_of(offsets) : 0;
    const auto segments =
        segments_of(offsets, walk, columns, std::nullopt, rows, sqnorm.numel(), 1);
    STD_TORCH_CHECK(segments.count == count, "gradnorm: sums must be [segments, width]");
    gradnorm::per_sample_wgrad_cpu(
        vector_of<T>(sums, count * width, kType<T>), width, segments,
        vector_of<T>(weight, count, kType<T>), dw ? out_of<T>(*dw, width) : nullptr,
        out_of<T>(sqnorm, sqnorm.numel()), sqnorm.numel(), torch_host<T>());
  });
}

void segment_std_cpu(const Tensor& values, const Tensor& ids, int64_t ddof, Tensor& mean,
                     Tensor& std, Tensor& count, Tensor& low, Tensor& high) {
  for_type(values, [&](auto zero) {
    using T = decltype(zero);
    const int64_t n = values.numel(), segments = count.numel();
    const int64_t* id = vector_of<int64_t>(ids, n, ScalarType::Long);
    STD_TORCH_CHECK(all_below(id, n, segments), "gradnorm: ids out of range");
    gradnorm::segment_std_cpu(vector_of<T>(values, n, kType<T>), id, n, segments, ddof,
                              segment_std_out<T>(mean, std, count, low, high));
  });
}

const int64_t* labels_of(const Tensor& labels, int64_t rows, int64_t vocabulary, int64_t ignored) {
  const int64_t* label = vector_of<int64_t>(labels, rows, ScalarType::Long);
  STD_TORCH_CHECK(
      std::all_of(label, label + rows,
                  [=](int64_t y) { return y == ignored || (0 <= y && y < vocabulary); }),
      "gradnorm: labels out of range");
  return label;
}

void logit_scores_cpu(const Tensor& logits, const Tensor& labels, int64_t ignored,
                      Tensor& log_probability, Tensor& w) {
  for_type(logits, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = logits.size(0), vocabulary = logits.size(1);
    gradnorm::logit_scores_cpu(rows_of<T>(logits, rows), logits.stride(0),
                               labels_of(labels, rows, vocabulary, ignored), rows, vocabulary,
                               ignored, out_of<T>(log_probability, rows), out_of<T>(w, rows),
                               torch_host<T>());
  });
}

void logit_gradient_rates_cpu(const Tensor& logits, const Tensor& labels, int64_t ignored,
                              Tensor& count, Tensor& up, Tensor& down) {
  for_type(logits, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = logits.size(0), vocabulary = logits.size(1);
    gradnorm::logit_gradient_rates_cpu(
        rows_of<T>(logits, rows), logits.stride(0), labels_of(labels, rows, vocabulary, ignored),
        rows, vocabulary, ignored, out_of<int64_t>(count, vocabulary, ScalarType::Long),
        out_of<double>(up, vocabulary), out_of<double>(down, vocabulary), torch_host<T>());
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gradnorm, CPU, m) {
  m.impl("outer_sqnorm", TORCH_BOX(&outer_sqnorm_cpu));
  m.impl("outer_wgrad", TORCH_BOX(&outer_wgrad_cpu));
  m.impl("im2col_wgrad", TORCH_BOX(&im2col_wgrad_cpu));
  m.impl("lookup_wgrad", TORCH_BOX(&lookup_wgrad_cpu));
  m.impl("segment_scale_grad", TORCH_BOX(&segment_scale_grad_cpu));
  m.impl("segment_sum", TORCH_BOX(&segment_sum_cpu));
  m.impl("per_sample_wgrad", TORCH_BOX(&per_sample_wgrad_cpu));
  m.impl("segment_std", TORCH_BOX(&segment_std_cpu));
  m.impl("logit_scores", TORCH_BOX(&logit_scores_cpu));
  m.impl("logit_gradient_rates", TORCH_BOX(&logit_gradient_rates_cpu));
}
