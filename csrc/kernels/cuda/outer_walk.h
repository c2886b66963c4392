// How a fused product goes through its rows: shared by the kernels of sm_80 and of Hopper.
#pragma once

#include "kernels/cuda/device.h"
#include "kernels/outer_wgrad.h"
#include "kernels/segment_sum.h"

namespace gradnorm {

// The first item whose unit belongs to a split from `split` on; units are dealt out by where they
// begin among the rows.
__device__ inline int64_t first_item(const OuterWalk& walk, int64_t split, int64_t splits,
                                     int64_t rows) {
  if (split == 0) return 0;
  if (split == splits) return walk.items;
  int64_t low = 0, high = walk.items;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (walk.unit[middle] * splits < split * rows) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Blocks of kRows rows, item by item; an item without rows has one block, without rows.
template <int kRows, typename Index = int64_t>
struct Blocks {
  const OuterWalk* walk;
  Index item, last;  // last: the item after the last
  Index row, end;    // of this block on; the end of the item

  __device__ Blocks(const OuterWalk& given, int64_t first, int64_t last)
      : walk(&given), item(static_cast<Index>(first)), last(static_cast<Index>(last)) {
    start();
  }
  __device__ bool exists() const { return item < last; }
  __device__ bool ends_item() const { return row + kRows >= end; }
  __device__ void advance() {
    row += kRows;
    if (row < end) return;
    ++item;
    start();
  }

 private:
  __device__ void start() {
    if (item >= last) return;
    row = static_cast<Index>(walk->begin[item]);
    end = static_cast<Index>(walk->end[item]);
  }
};

// dw = the sum of the splits' dw.
inline void sum_slabs(const float* slabs, int64_t splits, const OuterProduct& product,
                      void* stream) {
  const int64_t size = product.d * product.p;
  segment_sum_cuda<float>(slabs, size, splits, size, nullptr, 1, product.dw, nullptr, stream);
}

}  // namespace gradnorm
