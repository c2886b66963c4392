// One pass over the rows, a block of columns at a time: runs of rows are added up in T, the runs in
// double, so that a segment of a hundred thousand rows is as exact as a short one.
#include "kernels/segment_scale_grad.h"

#include <algorithm>

#include "kernels/cpu/vectors.h"

namespace gradnorm {

template <typename T>
void segment_scale_grad_cpu(const T* x, int64_t x_stride, const T* g, int64_t g_stride,
                            int64_t width, const T* shift, const T* scale, const int64_t* offsets,
                            int64_t segments, T* out, const Host<T>& host) {
  const int64_t blocks = (width + kColumns - 1) / kColumns;
  host.parallel(segments * blocks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t s = i / blocks, column = i % blocks * kColumns;
      const int64_t columns = std::min(kColumns, width - column);
      ColumnSums<T> sums;
      for (int64_t r = offsets[s]; r < offsets[s + 1]; ++r) {
        add_product(g + r * g_stride + column, x + r * x_stride + column, shift ? shift[r] : T(0),
                    scale ? scale[r] : T(1), sums.run, columns);
        sums.end_row();
      }
      sums.write(out + s * width + column, columns);
    }
  });
}

template void segment_scale_grad_cpu<float>(const float*, int64_t, const float*, int64_t, int64_t,
                                            const float*, const float*, const int64_t*, int64_t,
                                            float*, const Host<float>&);
template void segment_scale_grad_cpu<double>(const double*, int64_t, const double*, int64_t,
                                             int64_t, const double*, const double*, const int64_t*,
                                             int64_t, double*, const Host<double>&);

}  // namespace gradnorm
