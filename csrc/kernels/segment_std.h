// Mean, standard deviation and range of the values of each segment; values come in any order.
#pragma once

#include <cstdint>

namespace gradnorm {

// Where the figures go: arrays [segments]. Empty segments: mean NaN, low +inf, high -inf.
// A NaN among a segment's values makes mean, std, low and high of that segment NaN.
template <typename T>
struct SegmentStd {
  T* mean;
  T* std;  // with ddof; NaN where count <= ddof
  int64_t* count;
  T* low;
  T* high;
};

// values  [n]; ids  [n] in [0, segments)
template <typename T>
void segment_std_cpu(const T* values, const int64_t* ids, int64_t n, int64_t segments, int64_t ddof,
                     const SegmentStd<T>& out);

// Every segment's block looks at all n ids: for few segments, or few values.
template <typename T>
void segment_std_cuda(const T* values, const int64_t* ids, int64_t n, int64_t segments,
                      int64_t ddof, const SegmentStd<T>& out, void* stream);

// The values of segment s are values[order[offsets[s]]] .. values[order[offsets[s + 1] - 1]].
template <typename T>
void segment_std_sorted_cuda(const T* values, const int64_t* order, const int64_t* offsets,
                             int64_t n, int64_t segments, int64_t ddof, const SegmentStd<T>& out,
                             void* stream);

}  // namespace gradnorm
