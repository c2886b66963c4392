// Two passes in double: sums of squares minus squared sums would call a group of equal rewards
// noisy.
#include "kernels/segment_std.h"

#include <cmath>
#include <limits>
#include <vector>

namespace gradnorm {

template <typename T>
void segment_std_cpu(const T* values, const int64_t* ids, int64_t n, int64_t segments, int64_t ddof,
                     const SegmentStd<T>& out) {
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  std::vector<double> mean(segments), squares(segments);
  for (int64_t s = 0; s < segments; ++s) {
    out.count[s] = 0;
    out.low[s] = kInfinity;
    out.high[s] = -kInfinity;
  }
  for (int64_t i = 0; i < n; ++i) {
    const int64_t s = ids[i];
    mean[s] += double(values[i]);
    out.count[s] += 1;
    // Comparisons with NaN are false: one that has arrived stays, and one that arrives is taken.
    if (!(values[i] >= out.low[s]) && !std::isnan(out.low[s])) out.low[s] = values[i];
    if (!(values[i] <= out.high[s]) && !std::isnan(out.high[s])) out.high[s] = values[i];
  }
  for (int64_t s = 0; s < segments; ++s) {
    mean[s] = out.count[s] > 0 ? mean[s] / double(out.count[s]) : kNaN;
    // Rounding moves the mean of equal values off them, and gives them a deviation.
    if (out.low[s] == out.high[s]) mean[s] = double(out.low[s]);
  }
  for (int64_t i = 0; i < n; ++i) {
    const double deviation = double(values[i]) - mean[ids[i]];
    squares[ids[i]] += deviation * deviation;
  }
  for (int64_t s = 0; s < segments; ++s) {
    const double freedom = double(out.count[s] - ddof);
    out.mean[s] = T(mean[s]);
    out.std[s] = T(freedom > 0 ? std::sqrt(squares[s] / freedom) : kNaN);
  }
}

template void segment_std_cpu<float>(const float*, const int64_t*, int64_t, int64_t, int64_t,
                                     const SegmentStd<float>&);
template void segment_std_cpu<double>(const double*, const int64_t*, int64_t, int64_t, int64_t,
                                      const SegmentStd<double>&);

}  // namespace gradnorm
