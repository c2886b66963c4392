// How much the gradients of cross-entropy push each class's logit up and down, over all rows.
#pragma once

#include <cstdint>

#include "kernels/host.h"

namespace gradnorm {

// count[v] += #{r: y_r = v},  up[v] += sum_{r: y_r = v} (1 - p_r[v]),
// down[v] += sum_{r: y_r != v} p_r[v],  p_r = softmax(logits[r])
//
// logits  [rows, vocabulary], inner stride 1; labels  [rows] in [0, vocabulary) or `ignored`, whose
// rows are left out; count, up, down  [vocabulary]
template <typename T>
void logit_gradient_rates_cpu(const T* logits, int64_t stride, const int64_t* labels, int64_t rows,
                              int64_t vocabulary, int64_t ignored, int64_t* count, double* up,
                              double* down, const Host<T>& host);

}  // namespace gradnorm
