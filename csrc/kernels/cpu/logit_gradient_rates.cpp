// Each part of the rows has sums of its own: runs of rows are added up in T, the runs in double.
// A row's exponentials wait in one row of scratch for their sum, which they are divided by.
#include "kernels/logit_gradient_rates.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu/vectors.h"

namespace gradnorm {
namespace {

constexpr int kRun = 64;  // rows added up in T

template <typename T>
struct Part {
  std::vector<T> exponentials, run;
  std::vector<double> down, up;
  std::vector<int64_t> count;

  explicit Part(int64_t vocabulary)
      : exponentials(vocabulary),
        run(vocabulary),
        down(vocabulary),
        up(vocabulary),
        count(vocabulary) {}

  void end_run() {
    for (size_t v = 0; v < run.size(); ++v) down[v] += double(run[v]);
    std::fill(run.begin(), run.end(), T(0));
  }

  void add_rows(const T* logits, int64_t stride, const int64_t* labels, int64_t begin, int64_t end,
                int64_t ignored) {
    const int64_t vocabulary = static_cast<int64_t>(run.size());
    int rows = 0;
    for (int64_t r = begin; r < end; ++r) {
      const int64_t y = labels[r];
      if (y == ignored) continue;
      const T* row = logits + r * stride;
      T* e = exponentials.data();
      const T top = largest(row, vocabulary);
      const double left = exp_into(row, top, e, y).sum;
      const double right = exp_into(row + y + 1, top, e + y + 1, vocabulary - y - 1).sum;
      const double total = left + right + std::exp(double(row[y]) - double(top));
      e[y] = 0;
      add(e, T(1 / total), run.data(), vocabulary);
      up[y] += (left + right) / total;
      count[y] += 1;
      if (++rows % kRun == 0) end_run();
    }
    end_run();
  }
};

}  // namespace

template <typename T>
void logit_gradient_rates_cpu(const T* logits, int64_t stride, const int64_t* labels, int64_t rows,
                              int64_t vocabulary, int64_t ignored, int64_t* count, double* up,
                              double* down, const Host<T>& host) {
  // Not ranges of whatever size they come in: the same number of threads gives the same bits.
  const int64_t parts = std::max<int64_t>(1, std::min(host.threads, rows / kRun));
  std::vector<Part<T>> sums(parts, Part<T>(vocabulary));
  host.parallel(parts, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      sums[i].add_rows(logits, stride, labels, rows * i / parts, rows * (i + 1) / parts, ignored);
    }
  });
  for (const Part<T>& part : sums) {
    for (int64_t v = 0; v < vocabulary; ++v) {
      count[v] += part.count[v];
      up[v] += part.up[v];
      down[v] += part.down[v];
    }
  }
}

template void logit_gradient_rates_cpu<float>(const float*, int64_t, const int64_t*, int64_t,
                                              int64_t, int64_t, int64_t*, double*, double*,
                                              const Host<float>&);
template void logit_gradient_rates_cpu<double>(const double*, int64_t, const int64_t*, int64_t,
                                               int64_t, int64_t, int64_t*, double*, double*,
                                               const Host<double>&);

}  // namespace gradnorm
