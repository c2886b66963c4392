// Log-probability of each row's label, and the squared norm of its gradient at the logits.
#pragma once

#include <cstdint>

#include "kernels/host.h"

namespace gradnorm {

// log_probability[r] = log p[y],  w[r] = (1 - p[y])^2 + sum_{v != y} p[v]^2,  p =
// softmax(logits[r])
//
// logits  [rows, vocabulary], inner stride 1; labels  [rows] in [0, vocabulary) or `ignored`, whose
// rows get 0; log_probability, w  [rows]
template <typename T>
void logit_scores_cpu(const T* logits, int64_t stride, const int64_t* labels, int64_t rows,
                      int64_t vocabulary, int64_t ignored, T* log_probability, T* w,
                      const Host<T>& host);

}  // namespace gradnorm
