// As segment_scale_grad.cpp, without the product.
#include "kernels/segment_sum.h"

#include <algorithm>

#include "kernels/cpu/vectors.h"

namespace gradnorm {

template <typename T>
void segment_sum_cpu(const T* g, int64_t g_stride, int64_t width, const int64_t* offsets,
                     int64_t segments, T* out, const Host<T>& host) {
  const int64_t blocks = (width + kColumns - 1) / kColumns;
  host.parallel(segments * blocks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t s = i / blocks, column = i % blocks * kColumns;
      const int64_t columns = std::min(kColumns, width - column);
      ColumnSums<T> sums;
      for (int64_t r = offsets[s]; r < offsets[s + 1]; ++r) {
        add(g + r * g_stride + column, T(1), sums.run, columns);
        sums.end_row();
      }
      sums.write(out + s * width + column, columns);
    }
  });
}

template void segment_sum_cpu<float>(const float*, int64_t, int64_t, const int64_t*, int64_t,
                                     float*, const Host<float>&);
template void segment_sum_cpu<double>(const double*, int64_t, int64_t, const int64_t*, int64_t,
                                      double*, const Host<double>&);

}  // namespace gradnorm
