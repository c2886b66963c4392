// Rows are taken in blocks: for two blocks of one segment, the products of their x and of their g
// are two small matrices, multiplied element by element and summed while they are in cache. Only
// the upper triangle of blocks is visited; what lies off the diagonal counts twice.
#include "kernels/outer_sqnorm.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "kernels/cpu/vectors.h"

namespace gradnorm {
namespace {

constexpr int64_t kBlock =
    64;  // two float tiles of 64 x 64: smaller blocks leave out more of the lower triangle

struct Item {
  int64_t segment, q, r, end;  // rows q .. and r .. of a segment that ends at `end`
};

}  // namespace

template <typename T>
void outer_sqnorm_cpu(const T* x, int64_t x_stride, const T* g, int64_t g_stride, int64_t p,
                      int64_t d, const int64_t* offsets, int64_t segments, T* sqnorm,
                      const Host<T>& host) {
  std::vector<Item> items;
  for (int64_t s = 0; s < segments; ++s) {
    for (int64_t q = offsets[s]; q < offsets[s + 1]; q += kBlock) {
      for (int64_t r = q; r < offsets[s + 1]; r += kBlock) {
        items.push_back({s, q, r, offsets[s + 1]});
      }
    }
  }
  std::vector<double> partial(items.size());

  host.parallel(static_cast<int64_t>(items.size()), [&](int64_t begin, int64_t end) {
    std::unique_ptr<T[]> products;
    for (int64_t i = begin; i < end; ++i) {
      const auto [segment, q, r, stop] = items[i];
      const int64_t height = std::min(kBlock, stop - q), width = std::min(kBlock, stop - r);
      if (height == 1 && width == 1) {
        partial[i] =
            dot(x + q * x_stride, x + r * x_stride, p) * dot(g + q * g_stride, g + r * g_stride, d);
      } else {
        if (!products) products.reset(new T[2 * kBlock * kBlock]);
        T* of_x = products.get();
        T* of_g = of_x + kBlock * kBlock;
        host.multiply({x + q * x_stride, height, p, x_stride, 1},
                      {x + r * x_stride, p, width, 1, x_stride}, {of_x, height, width, width, 1}, 1,
                      0);
        host.multiply({g + q * g_stride, height, d, g_stride, 1},
                      {g + r * g_stride, d, width, 1, g_stride}, {of_g, height, width, width, 1}, 1,
                      0);
        partial[i] = dot(of_x, of_g, height * width);
      }
      if (q != r) partial[i] *= 2;
    }
  });

  std::vector<double> total(segments);
  for (size_t i = 0; i < items.size(); ++i) total[items[i].segment] += partial[i];
  // Rounding can take a sum of nearly cancelling terms below zero; a square is not.
  for (int64_t s = 0; s < segments; ++s) sqnorm[s] = T(total[s] < 0 ? 0 : total[s]);
}

template void outer_sqnorm_cpu<float>(const float*, int64_t, const float*, int64_t, int64_t,
                                      int64_t, const int64_t*, int64_t, float*, const Host<float>&);
template void outer_sqnorm_cpu<double>(const double*, int64_t, const double*, int64_t, int64_t,
                                       int64_t, const int64_t*, int64_t, double*,
                                       const Host<double>&);

}  // namespace gradnorm
