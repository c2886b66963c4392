// outer_wgrad_ampere on the CPU, fragments, asynchronous copies and all, against sums in double.
#include "../groups.h"
#include "emulated.h"
#include "kernels/cuda/outer_wgrad.cu"

namespace {

// Where what ends with each segment of the walk belongs: of the segments (level 0), or of a level.
std::vector<int64_t> ends_of(const check::Grouped& grouped, size_t level) {
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
template <typename T>
void test(const check::Case& one, int64_t d, int64_t p, size_t inner, bool has_outer, bool with_dw,
          int64_t multiprocessors) {
  check::Grouped grouped = one.grouped;
  const int64_t items = grouped.segments().count, rows = grouped.offsets.back();
  const int64_t x_stride = (p + 7) / 8 * 8 + 8, g_stride = (d + 7) / 8 * 8;
  const check::Fenced<T> x((rows - 1) * x_stride + (p + 7) / 8 * 8), g(rows * g_stride);
  check::fill(x, 1), check::fill(g, 2);
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
  const check::Fenced<int64_t> begin(begins), end(ends), of_unit(units), of_inner(inner_ends),
      of_outer(outer_ends), output(outputs);
  const check::Fenced<float> weight(weights);
  const gradnorm::OuterWalk walk = {items,
                                    begin.data(),
                                    end.data(),
                                    of_unit.data(),
                                    of_inner.data(),
                                    has_outer ? of_outer.data() : nullptr,
                                    outputs.empty() ? nullptr : output.data(),
                                    weights.empty() ? nullptr : weight.data()};

  const int64_t parts = gradnorm::outer_parts(gradnorm::OuterKernel::kAmpere, d, p);
  const int64_t size = grouped.output_count * d * p, columns = grouped.column_count;
  const std::string what = std::string(check::name_of<T>()) + ", " + one.what + " [" +
                           std::to_string(d) + ", " + std::to_string(p) + "] level " +
                           std::to_string(inner) + (has_outer ? " and next" : "") +
                           (with_dw ? ", dw" : "");
  const std::function<std::vector<float>()> run = [&] {
    const check::Fenced<float> dw(size), norms(columns * parts);
    std::fill_n(norms.data(), norms.size(), 0.0f);
    gradnorm::OuterProduct product = {
        x_stride, g_stride, rows, p, d, with_dw ? dw.data() : nullptr, norms.data()};
    const check::Fenced<float> workspace(gradnorm::outer_workspace(
        gradnorm::OuterKernel::kAmpere, walk, product, items, multiprocessors));
    gradnorm::outer_wgrad_ampere<T>(x.data(), g.data(), walk, product, items, multiprocessors,
                                    workspace.data(), nullptr);
    if (multiprocessors > 1 && with_dw && outputs.empty()) {
      check::failures += workspace.size() == 0;  // meant to be split
    }
    std::vector<float> found(columns);
    for (int64_t i = 0; i < columns * parts; ++i) found[i / parts] += norms[i];
    if (with_dw) found.insert(found.end(), dw.data(), dw.data() + size);
    return found;
  };
  const std::vector<float> found = check::in_every_order(what, run);

  std::vector<double> expected_dw, expected;
  const auto gradient = [&](int64_t s) {
    std::vector<double> of_segment(d * p);
    for (int64_t r = grouped.offsets[s]; r < grouped.offsets[s + 1]; ++r) {
      for (int64_t i = 0; i < d; ++i) {
        for (int64_t j = 0; j < p; ++j) {
          of_segment[i * p + j] +=
              check::value_of(g[r * g_stride + i]) * check::value_of(x[r * x_stride + j]);
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
  check::close(what + ": sqnorm", std::vector<float>(found.begin(), found.begin() + columns),
               expected, 32);
  if (!with_dw) return;
  check::close(what + ": dw", std::vector<float>(found.begin() + columns, found.end()), expected_dw,
               64);
}

// A NaN in the rows of one segment is in its norm, and in no neighbour's.
void test_nan() {
  constexpr int64_t kWidth = 8;
  const check::Fenced<check::BFloat16> rows(48 * kWidth);
  check::fill(rows, 1);
  for (int64_t i = 5 * kWidth; i < 45 * kWidth; ++i) rows[i] = {0x7fc0};
  const check::Fenced<int64_t> begin(std::vector<int64_t>{0, 5, 45}),
      end(std::vector<int64_t>{5, 45, 48}), column(std::vector<int64_t>{0, 1, 2});
  const gradnorm::OuterWalk walk = {3,       begin.data(), end.data(), begin.data(), column.data(),
                                    nullptr, nullptr,      nullptr};
  const check::Fenced<float> norms(3);
  const gradnorm::OuterProduct product = {kWidth, kWidth,  48,          kWidth,
                                          kWidth, nullptr, norms.data()};
  gradnorm::outer_wgrad_ampere(rows.data(), rows.data(), walk, product, 3, 1, nullptr, nullptr);
  const bool ok = !std::isnan(norms[0]) && std::isnan(norms[1]) && !std::isnan(norms[2]);
  std::printf("%s a NaN stays in its segment\n", ok ? "ok" : "FAIL");
  check::failures += !ok;
}

template <typename T>
void test_all() {
  for (const check::Case& one : check::cases()) {
    if (one.grouped.lengths.empty() || one.grouped.lengths.size() == 4) continue;
    const bool has_groups = !one.grouped.levels.empty(), has_weights = !one.grouped.weights.empty();
    if (!one.grouped.outputs.empty()) {
      if (has_groups && !has_weights) test<T>(one, 10, 7, 1, true, true, 1);
      continue;
    }
    test<T>(one, 10, 7, 0, false, true, 1);
    if (has_groups && !has_weights) test<T>(one, 10, 7, 0, true, true, 1);
    if (has_groups) test<T>(one, 9, 140, 1, true, false, 1);
  }
  check::Case nested = check::cases()[3];
  test<T>(nested, 130, 136, 0, true, true, 1);  // four tiles
  nested.what = "600 rows";
  nested.grouped.lengths = {100, 0, 33, 31, 64, 300, 72};
  test<T>(nested, 10, 8, 0, false, true, 100);
  test<T>(nested, 10, 8, 0, true, true, 100);
}

}  // namespace

int main() {
  test_all<check::Half>();
  test_all<check::BFloat16>();
  test_nan();
  return check::failures != 0;
}
