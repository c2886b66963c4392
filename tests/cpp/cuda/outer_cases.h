// What every fused product is tested on, against sums in double.
#pragma once

#include "../groups.h"
#include "emulated.h"
#include "kernels/outer_wgrad.h"

namespace check {

// A `Fused` is a kernel: kKernel, its kTile, and run<T>(x, g, walk, product, units,
// multiprocessors, workspace, stream).

// Where what ends with each segment of the walk belongs: of the segments (level 0), or of a level.
inline std::vector<int64_t> ends_of(const Grouped& grouped, size_t level) {
  const int64_t count = int64_t(grouped.lengths.size());
  const auto column = [&](int64_t w) {
    const int64_t s = grouped.walk[w];
    return level == 0 ? s : grouped.columns[(level - 1) * count + s];
  };
  std::vector<int64_t> ends(count, -1);
  for (int64_t w = 0; w < count; ++w) {
    if (w + 1 == count || column(w + 1) != column(w)) ends[w] = column(w);
  }
  return ends;
}

// The norms of levels inner and, if there is one, inner + 1; with_dw: and dw.
template <typename Fused, typename T>
void test_outer(const Case& one, int64_t d, int64_t p, size_t inner, bool has_outer, bool with_dw,
                int64_t multiprocessors) {
  Grouped grouped = one.grouped;
  const int64_t items = grouped.segments().count, rows = grouped.offsets.back();
  const int64_t x_stride = (p + 7) / 8 * 8 + 8, g_stride = (d + 7) / 8 * 8;
  const Fenced<T> x((rows - 1) * x_stride + (p + 7) / 8 * 8), g(rows * g_stride);
  fill(x, 1), fill(g, 2);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = p; i < (p + 7) / 8 * 8; ++i) x[r * x_stride + i] = {0};
    for (int64_t i = d; i < g_stride; ++i) g[r * g_stride + i] = {0};
  }
  std::vector<int64_t> begins, ends, units, outputs;
  const std::vector<int64_t> inner_ends = ends_of(grouped, inner);
  const std::vector<int64_t> outer_ends = has_outer ? ends_of(grouped, inner + 1) : inner_ends;
  int64_t before = 0, unit = 0;
  std::vector<float> weights;
  for (int64_t w = 0; w < items; ++w) {
    const int64_t s = grouped.walk[w];
    begins.push_back(grouped.offsets[s]);
    ends.push_back(grouped.offsets[s + 1]);
    units.push_back(unit);
    before += grouped.lengths[s];
    if (outer_ends[w] >= 0) unit = before;
    if (!grouped.outputs.empty()) outputs.push_back(grouped.outputs[s]);
    if (!grouped.weights.empty()) weights.push_back(float(grouped.weights[s]));
  }
  const Fenced<int64_t> begin(begins), end(ends), of_unit(units), of_inner(inner_ends),
      of_outer(outer_ends), output(outputs);
  const Fenced<float> weight(weights);
  const gradnorm::OuterWalk walk = {items,
                                    begin.data(),
                                    end.data(),
                                    of_unit.data(),
                                    of_inner.data(),
                                    has_outer ? of_outer.data() : nullptr,
                                    outputs.empty() ? nullptr : output.data(),
                                    weights.empty() ? nullptr : weight.data()};

  const int64_t parts = gradnorm::outer_parts(Fused::kKernel, d, p);
  const int64_t size = grouped.output_count * d * p, columns = grouped.column_count;
  const std::string what = std::string(name_of<T>()) + ", " + one.what + " [" + std::to_string(d) +
                           ", " + std::to_string(p) + "] level " + std::to_string(inner) +
                           (has_outer ? " and next" : "") + (with_dw ? ", dw" : "");
  const std::function<std::vector<float>()> run = [&] {
    const Fenced<float> dw(size), norms(columns * parts);
    std::fill_n(norms.data(), norms.size(), 0.0f);
    gradnorm::OuterProduct product = {
        x_stride, g_stride, rows, p, d, with_dw ? dw.data() : nullptr, norms.data()};
    const Fenced<float> workspace(
        gradnorm::outer_workspace(Fused::kKernel, walk, product, items, multiprocessors));
    Fused::template run<T>(x.data(), g.data(), walk, product, items, multiprocessors,
                           workspace.data(), nullptr);
    if (multiprocessors > 1 && with_dw && outputs.empty()) {
      failures += workspace.size() == 0;  // meant to be split
    }
    std::vector<float> found(columns);
    for (int64_t i = 0; i < columns * parts; ++i) found[i / parts] += norms[i];
    if (with_dw) found.insert(found.end(), dw.data(), dw.data() + size);
    return found;
  };
  const std::vector<float> found = in_every_order(what, run);

  std::vector<double> expected_dw, expected;
  const auto gradient = [&](int64_t s) {
    std::vector<double> of_segment(d * p);
    for (int64_t r = grouped.offsets[s]; r < grouped.offsets[s + 1]; ++r) {
      for (int64_t i = 0; i < d; ++i) {
        for (int64_t j = 0; j < p; ++j) {
          of_segment[i * p + j] += value_of(g[r * g_stride + i]) * value_of(x[r * x_stride + j]);
        }
      }
    }
    return of_segment;
  };
  grouped.expect(d * p, gradient, true, &expected_dw, &expected);
  for (int64_t column = 0; column < columns; ++column) {  // of other levels nothing is written
    const auto has = [&](const std::vector<int64_t>& list) {
      return std::find(list.begin(), list.end(), column) != list.end();
    };
    if (!has(inner_ends) && !has(outer_ends)) expected[column] = 0;
  }
  close(what + ": sqnorm", std::vector<float>(found.begin(), found.begin() + columns), expected,
        32);
  if (!with_dw) return;
  close(what + ": dw", std::vector<float>(found.begin() + columns, found.end()), expected_dw, 64);
}

// A NaN in the rows of one segment is in its norm, and in no neighbour's.
template <typename Fused>
void test_nan() {
  constexpr int64_t kWidth = 8;
  const Fenced<BFloat16> rows(48 * kWidth);
  fill(rows, 1);
  for (int64_t i = 5 * kWidth; i < 45 * kWidth; ++i) rows[i] = {0x7fc0};
  const Fenced<int64_t> begin(std::vector<int64_t>{0, 5, 45}), end(std::vector<int64_t>{5, 45, 48}),
      column(std::vector<int64_t>{0, 1, 2});
  const gradnorm::OuterWalk walk = {3,       begin.data(), end.data(), begin.data(), column.data(),
                                    nullptr, nullptr,      nullptr};
  const int64_t parts = gradnorm::outer_parts(Fused::kKernel, kWidth, kWidth);
  const Fenced<float> norms(3 * parts);
  const gradnorm::OuterProduct product = {kWidth, kWidth,  48,          kWidth,
                                          kWidth, nullptr, norms.data()};
  Fused::template run<BFloat16>(rows.data(), rows.data(), walk, product, 3, 1, nullptr, nullptr);
  const auto is_nan = [&](int64_t segment) {
    return std::any_of(norms.data() + segment * parts, norms.data() + (segment + 1) * parts,
                       [](float part) { return std::isnan(part); });
  };
  const bool ok = !is_nan(0) && is_nan(1) && !is_nan(2);
  std::printf("%s a NaN stays in its segment\n", ok ? "ok" : "FAIL");
  failures += !ok;
}

template <typename Fused, typename T>
void test_outer_cases() {
  for (const Case& one : cases()) {
    if (one.grouped.lengths.empty() || one.grouped.lengths.size() == 4) continue;
    const bool has_groups = !one.grouped.levels.empty(), has_weights = !one.grouped.weights.empty();
    if (!one.grouped.outputs.empty()) {
      if (has_groups && !has_weights) test_outer<Fused, T>(one, 10, 7, 1, true, true, 1);
      continue;
    }
    test_outer<Fused, T>(one, 10, 7, 0, false, true, 1);
    if (has_groups && !has_weights) test_outer<Fused, T>(one, 10, 7, 0, true, true, 1);
    if (has_groups) test_outer<Fused, T>(one, 9, 140, 1, true, false, 1);
  }
  Case nested = cases()[3];
  test_outer<Fused, T>(nested, Fused::kTile.d + 2, Fused::kTile.p + 8, 0, true, true,
                       1);  // four tiles
  test_outer<Fused, T>(cases()[4], Fused::kTile.d + 2, Fused::kTile.p + 8, 0, false, true, 1);
  nested.what = "600 rows";
  nested.grouped.lengths = {100, 0, 33, 31, 64, 300, 72};
  test_outer<Fused, T>(nested, 10, 8, 0, false, true, 100);
  test_outer<Fused, T>(nested, 10, 8, 0, true, true, 100);
}

}  // namespace check
