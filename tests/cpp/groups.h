// Segments in nested groups, and what their norms and gradients are, written out in double.
#pragma once

#include <algorithm>
#include <functional>
#include <map>
#include <numeric>
#include <vector>

#include "kernels/segments.h"

namespace check {

struct Grouped {
  std::vector<int64_t> lengths;
  std::vector<std::vector<int64_t>> levels;  // fine to coarse: the group of every segment
  std::vector<int64_t> outputs;              // empty: one output
  std::vector<double> weights;               // empty: all 1

  std::vector<int64_t> offsets{0}, walk = {}, columns = {};
  int64_t column_count = 0, output_count = 1;

  gradnorm::Segments segments() {
    const int64_t count = static_cast<int64_t>(lengths.size());
    offsets.resize(1);
    for (int64_t length : lengths) offsets.push_back(offsets.back() + length);
    walk.resize(count);
    std::iota(walk.begin(), walk.end(), 0);
    columns.clear();
    column_count = count;
    for (const auto& level : levels) {
      const auto before = [&](int64_t a, int64_t b) { return level[a] < level[b]; };
      std::stable_sort(walk.begin(), walk.end(), before);
      int64_t groups = 0;
      for (int64_t group : level) {
        columns.push_back(column_count + group);
        groups = std::max(groups, group + 1);
      }
      column_count += groups;
    }
    for (int64_t output : outputs) output_count = std::max(output_count, output + 1);
    return {count,          offsets.data(),
            walk.data(),    static_cast<int64_t>(levels.size()),
            columns.data(), outputs.empty() ? nullptr : outputs.data()};
  }

  // gradient(segment) is one segment's gradient, [size].
  void expect(int64_t size, const std::function<std::vector<double>(int64_t)>& gradient,
              bool segment_norms, std::vector<double>* dw, std::vector<double>* sqnorm) const {
    const int64_t count = static_cast<int64_t>(lengths.size());
    dw->assign(output_count * size, 0);
    sqnorm->assign(column_count, 0);
    std::map<int64_t, std::vector<double>> sums;  // column -> the gradient of its group
    for (int64_t s = 0; s < count; ++s) {
      const std::vector<double> of_segment = gradient(s);
      const auto add_to = [&](std::vector<double>& sum) {
        sum.resize(size);
        for (int64_t i = 0; i < size; ++i) sum[i] += of_segment[i];
      };
      if (segment_norms) add_to(sums[s]);
      for (size_t level = 0; level < levels.size(); ++level)
        add_to(sums[columns[level * count + s]]);
      double* out = dw->data() + (outputs.empty() ? 0 : outputs[s]) * size;
      const double weight = weights.empty() ? 1 : weights[s];
      for (int64_t i = 0; i < size; ++i) out[i] += weight * of_segment[i];
    }
    for (const auto& [column, sum] : sums) {
      long double total =
          0;  // tens of thousands of terms: in double the naive sum is the worse one
      for (double entry : sum) total += entry * entry;
      (*sqnorm)[column] = double(total);
    }
  }
};

// What both wgrads are tested on.
struct Case {
  const char* what;
  Grouped grouped;
};

inline std::vector<Case> cases() {
  const std::vector<std::vector<int64_t>> nested = {{2, 0, 1, 0, 2, 1, 3}, {1, 0, 0, 0, 1, 0, 1}};
  const std::vector<int64_t> lengths = {3, 0, 7, 20, 1, 9, 2};
  std::vector<Case> cases = {
      {"one row", {{1}, {}, {}, {}}},
      {"no segments", {{}, {}, {}, {}}},
      {"ragged segments, one of them empty", {{7, 0, 63, 1000}, {}, {}, {}}},
      {"nested groups", {lengths, nested, {}, {}}},
      {"a weight per segment", {lengths, nested, {}, {1, 2, 0.5, 0, 3, -1, 1}}},
      {"a weight per group", {lengths, nested, {}, {1, 3, 3, 3, 1, 3, 1}}},
      {"an output per group", {lengths, nested, {1, 0, 0, 0, 1, 0, 1}, {}}},
      {"outputs and weights", {lengths, nested, {1, 0, 0, 0, 1, 0, 1}, {2, 1, 1, 2, 2, 1, 2}}},
      {"outputs without groups", {{4, 5, 6}, {}, {0, 1, 1}, {1, 1, 2}}},
  };
  return cases;
}

}  // namespace check
