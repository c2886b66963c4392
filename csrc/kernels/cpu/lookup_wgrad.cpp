// The rows of a segment (of a group, of an output) are sorted by id, runs of equal id are added up
// in one row of scratch, and that row is squared or, for dw, is the table's row itself.
#include "kernels/lookup_wgrad.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "kernels/cpu/vectors.h"

namespace gradnorm {
namespace {

struct Row {
  int64_t id, row, segment;
  bool operator<(const Row& other) const {
    return id != other.id ? id < other.id : row < other.row;
  }
};

// A segment, a group or an output: walk[begin] .. walk[end].
struct Node {
  int64_t begin, end;
  int64_t column;  // where its sqnorm goes
};

class Rows {
 public:
  Rows(const int64_t* ids, int64_t padding_idx, const Segments& segments)
      : ids_(ids), padding_idx_(padding_idx), segments_(segments) {}

  std::vector<Row> sorted(int64_t begin, int64_t end) const {
    std::vector<Row> rows;
    for (int64_t w = begin; w < end; ++w) {
      const int64_t s = segments_.walk[w];
      for (int64_t r = segments_.offsets[s]; r < segments_.offsets[s + 1]; ++r) {
        if (ids_[r] != padding_idx_) rows.push_back({ids_[r], r, s});
      }
    }
    std::sort(rows.begin(), rows.end());
    return rows;
  }

 private:
  const int64_t* ids_;
  const int64_t padding_idx_;
  const Segments& segments_;
};

int64_t run_end(const std::vector<Row>& rows, int64_t begin) {
  int64_t end = begin + 1;
  while (end < static_cast<int64_t>(rows.size()) && rows[end].id == rows[begin].id) ++end;
  return end;
}

// The stretches of the walk on which `key` of a segment stays the same.
template <typename Key>
std::vector<Node> stretches(const Segments& segments, const Key& key) {
  std::vector<Node> nodes;
  for (int64_t w = 0; w < segments.count; ++w) {
    const int64_t column = key(segments.walk[w]);
    if (nodes.empty() || nodes.back().column != column) nodes.push_back({w, w, column});
    nodes.back().end = w + 1;
  }
  return nodes;
}

}  // namespace

template <typename T>
void lookup_wgrad_cpu(const int64_t* ids, const T* g, int64_t g_stride, int64_t d,
                      int64_t vocabulary, const Segments& segments, const T* weight,
                      int64_t padding_idx, T* dw, T* sqnorm, const Host<T>& host) {
  const Rows rows(ids, padding_idx, segments);

  std::vector<Node> nodes = stretches(segments, [](int64_t s) { return s; });
  std::vector<std::pair<int64_t, int64_t>> aliases;  // groups of one segment share its norm
  for (int64_t level = 0; level < segments.levels; ++level) {
    const int64_t* columns = segments.columns + level * segments.count;
    for (const Node& group : stretches(segments, [&](int64_t s) { return columns[s]; })) {
      if (group.end == group.begin + 1) {
        aliases.emplace_back(group.column, segments.walk[group.begin]);
      } else {
        nodes.push_back(group);
      }
    }
  }
  host.parallel(static_cast<int64_t>(nodes.size()), [&](int64_t begin, int64_t end) {
    std::vector<T> sum(d);
    for (int64_t n = begin; n < end; ++n) {
      const std::vector<Row> sorted = rows.sorted(nodes[n].begin, nodes[n].end);
      double total = 0;
      for (int64_t i = 0, next; i < static_cast<int64_t>(sorted.size()); i = next) {
        next = run_end(sorted, i);
        const T* row = g + sorted[i].row * g_stride;
        if (next > i + 1) {
          std::fill(sum.begin(), sum.end(), T(0));
          for (int64_t k = i; k < next; ++k) add(g + sorted[k].row * g_stride, T(1), sum.data(), d);
          row = sum.data();
        }
        total += dot(row, row, d);
      }
      sqnorm[nodes[n].column] = T(total);
    }
  });
  for (const auto& [column, segment] : aliases) sqnorm[column] = sqnorm[segment];

  if (!dw) return;
  const auto output = [&](int64_t s) { return segments.outputs ? segments.outputs[s] : 0; };
  for (const Node& part : stretches(segments, output)) {
    const std::vector<Row> sorted = rows.sorted(part.begin, part.end);
    const int64_t count = static_cast<int64_t>(sorted.size());
    T* table = dw + part.column * vocabulary * d;
    // One item per run of equal ids: no two threads write one row, and who adds in what order does
    // not depend on how many there are.
    std::vector<int64_t> starts;
    for (int64_t i = 0; i < count; i = run_end(sorted, i)) starts.push_back(i);
    starts.push_back(count);
    host.parallel(static_cast<int64_t>(starts.size()) - 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = starts[begin]; i < starts[end]; ++i) {
        add(g + sorted[i].row * g_stride, weight ? weight[sorted[i].segment] : T(1),
            table + sorted[i].id * d, d);
      }
    });
  }
}

template void lookup_wgrad_cpu<float>(const int64_t*, const float*, int64_t, int64_t, int64_t,
                                      const Segments&, const float*, int64_t, float*, float*,
                                      const Host<float>&);
template void lookup_wgrad_cpu<double>(const int64_t*, const double*, int64_t, int64_t, int64_t,
                                       const Segments&, const double*, int64_t, double*, double*,
                                       const Host<double>&);

}  // namespace gradnorm
