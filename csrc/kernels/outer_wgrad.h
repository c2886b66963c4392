// The weight gradient of a linear layer and its norms per segment and group, by the direct method.
#pragma once

#include "kernels/floats.h"
#include "kernels/host.h"
#include "kernels/im2col.h"
#include "kernels/segments.h"

namespace gradnorm {

// With G[s] = sum_{r in s} g[r] x[r]^T:
//
//   dw[o]          = sum_{s: outputs[s] = o} weight[s] G[s]
//   sqnorm[s]      = |G[s]|^2                      (only if segment_norms)
//   sqnorm[column] = |sum_{s in group} G[s]|^2     for every group of every level, unweighted
//
//   x  [rows, p], g  [rows, d], inner stride 1
//   weight  [segments] or null (all 1); dw  [outputs, d, p] contiguous or null (norms only)
//   sqnorm  zero-filled by the caller; so is dw if some output has no rows
template <typename T>
void outer_wgrad_cpu(const T* x, int64_t x_stride, const T* g, int64_t g_stride, int64_t p,
                     int64_t d, const Segments& segments, const T* weight, T* dw, T* sqnorm,
                     bool segment_norms, const Host<T>& host);

// The same of rows x that are windows of images; each thread holds those of a segment at a time.
template <typename T>
void im2col_wgrad_cpu(const T* images, const Im2col& windows, const T* g, int64_t g_stride,
                      int64_t d, const Segments& segments, const T* weight, T* dw, T* sqnorm,
                      bool segment_norms, const Host<T>& host);

// The rows in the order in which a fused kernel multiplies them, in *items* of neighbouring rows.
// An item is added to the inner sum; where that ends, it is squared and added to the outer sum,
// where there is one, and so on. Arrays are on the device.
struct OuterWalk {
  int64_t items;
  const int64_t *begin, *end;   // [items]: its rows of x and g
  const int64_t* unit;          // [items], not decreasing: the rows before the first item of its
                                // unit, all of whose items are multiplied in one place
  const int64_t* inner_column;  // [items]: where the norm of the inner sum that ends with the item
                                // goes; -1: it goes on
  const int64_t* outer_column;  // likewise, or null: there is no outer sum
  const int64_t* output;        // [items] or null: each outer sum is a dw of its own, this one
  const float* weight;          // [items] or null for ones; not with an outer sum
};

struct OuterProduct {
  int64_t x_stride, g_stride;  // multiples of 8, as are the addresses of x and g; columns are zero
  int64_t rows, p, d;          // from p, and d, on to the next multiple of 8
  float* dw;                   // [outputs, d, p] or null; an output without items is not written
  float* norms;                // [columns, parts], zero-filled: the parts of every norm
};

// The same as outer_wgrad_cpu for one level of groups at most, T being Half or BFloat16: in CUDA
// for sm_80 and later, and for Hopper (sm_90a) alone, in tiles of 128 x 192 or of 128 x 256 (wide).
// workspace  as many floats as outer_workspace says.
enum class OuterKernel { kAmpere, kHopper, kHopperWide };

template <typename T>
void outer_wgrad_ampere(const T* x, const T* g, const OuterWalk& walk, const OuterProduct& product,
                        int64_t units, int64_t multiprocessors, float* workspace, void* stream);

template <typename T>
void outer_wgrad_hopper(OuterKernel kernel, const T* x, const T* g, const OuterWalk& walk,
                        const OuterProduct& product, int64_t units, int64_t multiprocessors,
                        float* workspace, void* stream);

// Of every norm, and floats; `units`: how many there are, at most.
int64_t outer_parts(OuterKernel kernel, int64_t d, int64_t p);
int64_t outer_workspace(OuterKernel kernel, const OuterWalk& walk, const OuterProduct& product,
                        int64_t units, int64_t multiprocessors);

}  // namespace gradnorm
