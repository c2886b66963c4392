// One walk over the segments for each block of the width: a group's sum goes to the group around it
// when it ends, as in outer_wgrad.cpp.
#include "kernels/per_sample_wgrad.h"

#include <algorithm>
#include <vector>

#include "kernels/cpu/vectors.h"

namespace gradnorm {

template <typename T>
void per_sample_wgrad_cpu(const T* sums, int64_t width, const Segments& segments, const T* weight,
                          T* dw, T* sqnorm, int64_t columns, const Host<T>& host) {
  const int64_t blocks = (width + kColumns - 1) / kColumns;
  std::vector<double> partial(blocks * columns);
  host.parallel(blocks, [&](int64_t block_begin, int64_t block_end) {
    for (int64_t block = block_begin; block < block_end; ++block) {
      const int64_t first = block * kColumns, n = std::min(kColumns, width - first);
      double* squares = partial.data() + block * columns;
      std::vector<ColumnSums<T>> groups(segments.levels);
      ColumnSums<T> total;
      T group_sum[kColumns];
      for (int64_t w = 0; w < segments.count; ++w) {
        const int64_t s = segments.walk[w];
        const T* row = sums + s * width + first;
        squares[s] = dot(row, row, n);
        if (dw) {
          add(row, weight ? weight[s] : T(1), total.run, n);
          total.end_row();
        }
        const T* ended = row;
        for (int64_t level = 0; level < segments.levels && ended; ++level) {
          add(ended, T(1), groups[level].run, n);
          groups[level].end_row();
          const int64_t* group = segments.columns + level * segments.count;
          const bool goes_on = w + 1 < segments.count && group[segments.walk[w + 1]] == group[s];
          ended = nullptr;
          if (!goes_on) {
            groups[level].write(group_sum, n);
            groups[level] = {};
            squares[group[s]] = dot(group_sum, group_sum, n);
            ended = group_sum;
          }
        }
      }
      if (dw) total.write(dw + first, n);
    }
  });
  for (int64_t column = 0; column < columns; ++column) {
    double total = 0;
    for (int64_t block = 0; block < blocks; ++block) total += partial[block * columns + column];
    sqnorm[column] = T(total);
  }
}

template void per_sample_wgrad_cpu<float>(const float*, int64_t, const Segments&, const float*,
                                          float*, float*, int64_t, const Host<float>&);
template void per_sample_wgrad_cpu<double>(const double*, int64_t, const Segments&, const double*,
                                           double*, double*, int64_t, const Host<double>&);

}  // namespace gradnorm
