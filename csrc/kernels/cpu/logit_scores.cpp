// Two looks at each row, the second of which finds it in the cache: the largest logit, then the
// sums of exponentials. The label's is left out of them: 1 - p[y] taken as a difference, or the
// logarithm of p[y], would be rounding alone where the model is sure.
#include "kernels/logit_scores.h"

#include <cmath>

#include "kernels/cpu/vectors.h"

namespace gradnorm {

template <typename T>
void logit_scores_cpu(const T* logits, int64_t stride, const int64_t* labels, int64_t rows,
                      int64_t vocabulary, int64_t ignored, T* log_probability, T* w,
                      const Host<T>& host) {
  host.parallel(rows, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t y = labels[r];
      if (y == ignored) {
        log_probability[r] = w[r] = 0;
        continue;
      }
      const T* row = logits + r * stride;
      const T top = largest(row, vocabulary);
      const ExpSums left = exp_sums(row, top, y);
      const ExpSums right = exp_sums(row + y + 1, top, vocabulary - y - 1);
      const double others = left.sum + right.sum, squares = left.squares + right.squares;
      const double below = double(row[y]) - double(top), total = others + std::exp(below);
      log_probability[r] = T(below == 0 ? -std::log1p(others) : below - std::log(total));
      w[r] = T((others * others + squares) / (total * total));
    }
  });
}

template void logit_scores_cpu<float>(const float*, int64_t, const int64_t*, int64_t, int64_t,
                                      int64_t, float*, float*, const Host<float>&);
template void logit_scores_cpu<double>(const double*, int64_t, const int64_t*, int64_t, int64_t,
                                       int64_t, double*, double*, const Host<double>&);

}  // namespace gradnorm
