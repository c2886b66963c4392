// dW is cut into tiles that stay in cache. For each tile the rows are walked segment by segment:
// a segment's tile is one matrix product into scratch, and one pass over it, while it is in cache,
// squares it and adds it to the tile of the group around it, whose end is treated likewise, up to
// dW itself. Where a fused product is faster, product and pass are one (fused_product.h). The walk
// is planned once and carried out for every tile.
#include "kernels/outer_wgrad.h"

#include <algorithm>
#include <unordered_set>
#include <utility>
#include <vector>

#include "kernels/cpu/fused_product.h"
#include "kernels/cpu/vectors.h"

namespace gradnorm {
namespace {

constexpr int kNone = -1;
constexpr int kOutput = -2;  // the tile of dw itself, in place of a scratch buffer

// Rows that are always used together, with what tells them from their neighbours.
template <typename T>
struct Leaf {
  int64_t row_begin, row_end;
  int64_t segment;
  int64_t output;
  T weight;
};

// Multiply rows into a buffer, or fold a buffer into another: square it, and add it; or both at
// once.
template <typename T>
struct Step {
  enum Kind { kMultiply, kFold, kFused } kind;
  int to;          // the buffer written, or kNone
  int64_t output;  // which dw kOutput means
  bool overwrite;
  T scale;
  int64_t row_begin = 0, row_end = 0;  // kMultiply, kFused
  int from = kNone;                    // kFold
  int64_t slot = kNone;                // kFold, kFused: where the sum of squares goes
};

template <typename T>
class Plan {
 public:
  Plan(const Segments& segments, const T* weight, bool with_dw, bool segment_norms,
       const FusedKernel* fused)
      : segments_(segments), with_dw_(with_dw), segment_norms_(segment_norms), fused_(fused) {
    find_leaves(weight);
    const int64_t count = static_cast<int64_t>(leaves_.size());
    for (int64_t begin = 0, end; begin < count; begin = end) {
      end = begin + 1;
      while (end < count && leaves_[end].output == leaves_[begin].output) ++end;
      compose(0, begin, end, kNone, 0, !with_dw);
    }
  }

  // How many rows a product has on average.
  int64_t rows_at_once() const {
    int64_t rows = 0, products = 0;
    for (const Step<T>& step : steps) {
      if (step.kind == Step<T>::kFold) continue;
      rows += step.row_end - step.row_begin;
      ++products;
    }
    return products == 0 ? 0 : rows / products;
  }

  std::vector<Step<T>> steps;
  int buffers = 0;
  std::vector<int64_t> slot_columns;                 // slot -> the column of sqnorm it belongs to
  std::vector<std::pair<int64_t, int64_t>> aliases;  // (column, slot) of groups that are equal

 private:
  void find_leaves(const T* weight) {
    for (int64_t w = 0; w < segments_.count; ++w) {
      const int64_t s = segments_.walk[w];
      Leaf<T> leaf{segments_.offsets[s], segments_.offsets[s + 1], s,
                   segments_.outputs ? segments_.outputs[s] : 0, weight ? weight[s] : T(1)};
      if (leaf.row_begin == leaf.row_end) continue;
      // Segments whose own norm nobody asked for are one product if they lie side by side.
      if (!segment_norms_ && !leaves_.empty()) {
        Leaf<T>& last = leaves_.back();
        if (last.row_end == leaf.row_begin && last.output == leaf.output &&
            last.weight == leaf.weight && same_groups(last.segment, s)) {
          last.row_end = leaf.row_end;
          continue;
        }
      }
      leaves_.push_back(leaf);
    }
  }

  bool same_groups(int64_t s, int64_t t) const {
    for (int64_t level = 0; level < segments_.levels; ++level) {
      const int64_t* columns = segments_.columns + level * segments_.count;
      if (columns[s] != columns[t]) return false;
    }
    return true;
  }

  // Depth 0 is an output, 1 the coarsest level, levels the finest, levels + 1 a leaf.
  int64_t column(int64_t depth, int64_t leaf) const {
    const int64_t s = leaves_[leaf].segment;
    if (depth == segments_.levels + 1) return segment_norms_ ? s : kNone;
    return segments_.columns[(segments_.levels - depth) * segments_.count + s];
  }

  int64_t child_end(int64_t depth, int64_t begin, int64_t end) const {
    if (depth == segments_.levels) return begin + 1;
    int64_t child = begin + 1;
    while (child < end && column(depth + 1, child) == column(depth + 1, begin)) ++child;
    return child;
  }

  bool same_weight(int64_t begin, int64_t end) const {
    return std::all_of(leaves_.begin() + begin, leaves_.begin() + end,
                       [&](const Leaf<T>& leaf) { return leaf.weight == leaves_[begin].weight; });
  }

  // Adds the children of the node [begin, end) to `into`, one after the other.
  void compose(int64_t depth, int64_t begin, int64_t end, int into, int free, bool dw_done) {
    for (int64_t child = begin, next; child < end; child = next) {
      next = child_end(depth, child, end);
      place(depth + 1, child, next, into, child == begin, free, dw_done);
    }
  }

  // Adds the node [begin, end) to its parent's buffer, its norm to the slots, and, unless an
  // ancestor does (dw_done), its weighted gradient to dw. Buffers from `free` on are unused.
  void place(int64_t depth, int64_t begin, int64_t end, int parent, bool first, int free,
             bool dw_done) {
    // A group of a single child is that child: one gradient, one norm, several columns.
    std::vector<int64_t> wanted;
    for (;; ++depth) {
      if (const int64_t c = column(depth, begin); c != kNone) wanted.push_back(c);
      if (depth == segments_.levels + 1 || child_end(depth, begin, end) != end) break;
    }
    const bool leaf = depth == segments_.levels + 1;
    const int64_t output = leaves_[begin].output;
    const T weight = leaves_[begin].weight;
    const bool adds_dw = !dw_done && same_weight(begin, end);

    if (leaf && wanted.empty() && (parent == kNone || !adds_dw)) {
      if (parent != kNone) multiply(begin, parent, T(1), first);
      if (adds_dw) multiply(begin, kOutput, weight, started_.insert(output).second);
      return;
    }

    int buffer;
    if (parent != kNone && first) {
      buffer = parent;  // nothing is there yet, so it is computed where it is wanted
    } else if (parent == kNone && adds_dw && weight == T(1) && started_.insert(output).second) {
      buffer = kOutput;
    } else {
      buffer = free++;
      buffers = std::max(buffers, free);
    }
    int64_t slot = kNone;
    if (!wanted.empty()) {
      slot = static_cast<int64_t>(slot_columns.size());
      slot_columns.push_back(wanted[0]);
      for (size_t i = 1; i < wanted.size(); ++i) aliases.emplace_back(wanted[i], slot);
    }
    const bool to_parent = parent != kNone && buffer != parent;
    const bool to_dw = adds_dw && buffer != kOutput;
    const bool stays = buffer == parent || buffer == kOutput;
    const int64_t rows = leaves_[begin].row_end - leaves_[begin].row_begin;
    if (leaf && stays + to_parent + to_dw <= 1 && fused_ &&
        (fused_->always || rows <= kFusedRows)) {
      const int to = stays ? buffer : to_dw ? kOutput : to_parent ? parent : kNone;
      const bool overwrite = stays || (to_dw && started_.insert(output).second);
      multiply(begin, to, to_dw ? weight : T(1), overwrite);
      steps.back().kind = Step<T>::kFused;
      steps.back().slot = slot;
      return;
    }
    if (leaf) {
      multiply(begin, buffer, T(1), true);
    } else {
      compose(depth, begin, end, buffer, free, dw_done || adds_dw);
    }
    if (to_dw) {
      const bool overwrite = started_.insert(output).second;
      fold(buffer, kOutput, output, std::exchange(slot, kNone), weight, overwrite);
    }
    if (to_parent) fold(buffer, parent, output, std::exchange(slot, kNone), T(1), false);
    if (slot != kNone) fold(buffer, kNone, output, slot, T(1), false);
  }

  void multiply(int64_t leaf, int to, T scale, bool overwrite) {
    const Leaf<T>& rows = leaves_[leaf];
    const auto kind = fused_ && fused_->always ? Step<T>::kFused : Step<T>::kMultiply;
    steps.push_back({kind, to, rows.output, overwrite, scale, rows.row_begin, rows.row_end});
  }

  void fold(int from, int to, int64_t output, int64_t slot, T scale, bool overwrite) {
    steps.push_back({Step<T>::kFold, to, output, overwrite, scale, 0, 0, from, slot});
  }

  const Segments& segments_;
  const bool with_dw_;
  const bool segment_norms_;
  const FusedKernel* const fused_;       // or null
  std::unordered_set<int64_t> started_;  // outputs that have been written
  std::vector<Leaf<T>> leaves_;
};

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

struct Tiling {
  int64_t height, width;  // of a tile of dw [d, p]
  int64_t down, across;   // how many there are
};

// Measured on 2026-11-21 (Xeon, 2 MB of L2, torch 2.13 with MKL), medians of 13 interleaved pairs
// with one product over all rows: the products want tiles that are wide and large (a width of 256
// in place of 1024 costs 5 to 10 %); the pass wants them small. With 128 rows a segment 512 KB lost
// 11 to 19 %, 1 MB 16 to 23 %; with 512 rows, where the pass weighs less, 1 MB lost 0 to 10 % and
// 512 KB 3 to 15 %.
constexpr int64_t kWidth = 1024;
constexpr int64_t kLongRows = 256;
constexpr int64_t kArea = 128 * kWidth, kAreaOfLong = 256 * kWidth;

Tiling tile(int64_t d, int64_t p, int64_t rows_at_once, int64_t threads, const FusedKernel* fused) {
  const int64_t high = fused ? fused->height : 16, wide = fused ? fused->width : 16;
  Tiling tiling;
  tiling.across = divide_up(p, fused ? fused->most_width(rows_at_once) : kWidth);
  tiling.width = round_up(divide_up(p, tiling.across), wide);
  tiling.across = divide_up(p, tiling.width);
  const int64_t area = rows_at_once >= kLongRows ? kAreaOfLong : kArea;
  int64_t down = divide_up(d, fused ? fused->most_height(tiling.width, rows_at_once)
                                    : round_up(area / tiling.width, 16));
  // As many tiles as the threads can share evenly, unless they get too thin to multiply well.
  if (d / 64 >= threads) {
    while (tiling.across * down % threads != 0 && tiling.across * down < 4 * threads) ++down;
  }
  tiling.height = round_up(divide_up(d, down), high);
  tiling.down = divide_up(d, tiling.height);
  return tiling;
}

// A matrix product sees the same alignment at every call, without which it would not give the same
// bits; and cache lines are whole.
constexpr int64_t kAlign = 64;

template <typename T>
T* aligned(std::vector<T>& memory, int64_t size) {
  memory.resize(std::max<size_t>(memory.size(), size + kAlign));
  T* data = memory.data();
  while (reinterpret_cast<uintptr_t>(data) % kAlign != 0) ++data;
  return data;
}

// Tile<const T> rows(begin, count, column, width): those columns of some rows of x.
template <typename T, typename Rows>
void outer_wgrad(const Rows& rows_of_x, const T* g, int64_t g_stride, int64_t p, int64_t d,
                 const Segments& segments, const T* weight, T* dw, T* sqnorm, bool segment_norms,
                 const Host<T>& host) {
  const FusedKernel* fused = std::is_same_v<T, float> ? fused_kernel() : nullptr;
  const Plan<T> plan(segments, weight, dw != nullptr, segment_norms, fused);
  if (plan.steps.empty() || p == 0 || d == 0) return;
  const int64_t rows_at_once = plan.rows_at_once();
  const bool fuses = fused && (fused->always || rows_at_once <= kFusedRows);
  const Tiling tiling = tile(d, p, rows_at_once, host.threads, fuses ? fused : nullptr);
  const int64_t tiles = tiling.down * tiling.across;
  const int64_t slots = static_cast<int64_t>(plan.slot_columns.size());
  std::vector<double> partial(tiles * slots);

  host.parallel(tiles, [&](int64_t tile_begin, int64_t tile_end) {
    const int64_t area = round_up(tiling.height * tiling.width, kAlign);
    static thread_local std::vector<T> memory;  // kept: fresh pages cost as much as a pass
    static thread_local std::vector<float> panels;
    T* scratch = aligned(memory, plan.buffers * area);

    for (int64_t index = tile_begin; index < tile_end; ++index) {
      const int64_t i = index / tiling.across * tiling.height;
      const int64_t j = index % tiling.across * tiling.width;
      const int64_t height = std::min(tiling.height, d - i);
      const int64_t width = std::min(tiling.width, p - j);
      const auto buffer = [&](int number, int64_t output) {
        if (number == kNone) return Tile<T>{nullptr, 0};
        return number == kOutput ? Tile<T>{dw + (output * d + i) * p + j, p}
                                 : Tile<T>{scratch + number * area, width};
      };
      for (const Step<T>& step : plan.steps) {
        const Tile<T> to = buffer(step.to, step.output);
        double squares = 0;
        if (step.kind == Step<T>::kFold) {
          const Tile<T> from = buffer(step.from, step.output);
          squares = step.to == kNone ? gradnorm::sqnorm(from, height, width)
                                     : fold(from, step.scale, step.overwrite, to, height, width);
        } else {
          const int64_t rows = step.row_end - step.row_begin;
          const T* of_g = g + step.row_begin * g_stride + i;
          const Tile<const T> of_x = rows_of_x(step.row_begin, rows, j, width);
          if (step.kind == Step<T>::kMultiply) {
            host.multiply({of_g, height, rows, 1, g_stride},
                          {of_x.data, rows, width, of_x.stride, 1},
                          {to.data, height, width, to.stride, 1}, step.scale, !step.overwrite);
          } else if constexpr (std::is_same_v<T, float>) {  // no other T is fused
            squares = fused->run({of_g, g_stride, height, of_x.data, of_x.stride, width, rows},
                                 step.scale, step.overwrite, to, panels);
          }
        }
        if (step.slot != kNone) partial[index * slots + step.slot] = squares;
      }
    }
  });

  std::vector<double> total(slots);
  for (int64_t index = 0; index < tiles; ++index) {
    for (int64_t slot = 0; slot < slots; ++slot) total[slot] += partial[index * slots + slot];
  }
  for (int64_t slot = 0; slot < slots; ++slot) sqnorm[plan.slot_columns[slot]] = T(total[slot]);
  for (const auto& [column, slot] : plan.aliases) sqnorm[column] = T(total[slot]);
}

}  // namespace

template <typename T>
void outer_wgrad_cpu(const T* x, int64_t x_stride, const T* g, int64_t g_stride, int64_t p,
                     int64_t d, const Segments& segments, const T* weight, T* dw, T* sqnorm,
                     bool segment_norms, const Host<T>& host) {
  // The transpose has the same norms, and as x the wider side is packed in less time.
  if (!dw && d > p) {
    outer_wgrad_cpu<T>(g, g_stride, x, x_stride, d, p, segments, weight, dw, sqnorm, segment_norms,
                       host);
    return;
  }
  const auto rows = [=](int64_t begin, int64_t, int64_t column, int64_t) {
    return Tile<const T>{x + begin * x_stride + column, x_stride};
  };
  outer_wgrad(rows, g, g_stride, p, d, segments, weight, dw, sqnorm, segment_norms, host);
}

template <typename T>
void im2col_wgrad_cpu(const T* images, const Im2col& windows, const T* g, int64_t g_stride,
                      int64_t d, const Segments& segments, const T* weight, T* dw, T* sqnorm,
                      bool segment_norms, const Host<T>& host) {
  const auto rows = [&](int64_t begin, int64_t count, int64_t column, int64_t width) {
    static thread_local std::vector<T> memory;
    T* seen = aligned(memory, count * width);
    windows.gather(images, begin, count, column, width, seen);
    return Tile<const T>{seen, width};
  };
  outer_wgrad(rows, g, g_stride, windows.columns(), d, segments, weight, dw, sqnorm, segment_norms,
              host);
}

template void outer_wgrad_cpu<float>(const float*, int64_t, const float*, int64_t, int64_t, int64_t,
                                     const Segments&, const float*, float*, float*, bool,
                                     const Host<float>&);
template void outer_wgrad_cpu<double>(const double*, int64_t, const double*, int64_t, int64_t,
                                      int64_t, const Segments&, const double*, double*, double*,
                                      bool, const Host<double>&);
template void im2col_wgrad_cpu<float>(const float*, const Im2col&, const float*, int64_t, int64_t,
                                      const Segments&, const float*, float*, float*, bool,
                                      const Host<float>&);
template void im2col_wgrad_cpu<double>(const double*, const Im2col&, const double*, int64_t,
                                       int64_t, const Segments&, const double*, double*, double*,
                                       bool, const Host<double>&);

}  // namespace gradnorm
