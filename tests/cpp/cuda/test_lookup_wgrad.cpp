// lookup_wgrad_cuda on the CPU, against each segment's table written out in double.
#include <numeric>

#include "../groups.h"
#include "emulated.h"
#include "kernels/cuda/lookup_wgrad.cu"

namespace {

using gradnorm::Accumulator;

template <typename T>
void test(const check::Case& one, int64_t d, int64_t stride, int64_t vocabulary,
          int64_t padding_idx) {
  using A = Accumulator<T>;
  check::Grouped grouped = one.grouped;
  const gradnorm::Segments segments = grouped.segments();
  const int64_t rows = grouped.offsets.back(), columns = grouped.column_count;
  const check::Fenced<T> g(rows ? (rows - 1) * stride + d : 0);
  check::fill(g, 1);
  std::vector<int64_t> ids(rows);
  std::mt19937 generator(2);
  for (int64_t& id : ids) id = generator() % vocabulary;
  const check::Fenced<A> weights(std::vector<A>(grouped.weights.begin(), grouped.weights.end()));

  std::vector<int64_t> row, segment, begin = {0}, place(rows);
  for (const int64_t s : grouped.walk) {
    for (int64_t r = grouped.offsets[s]; r < grouped.offsets[s + 1]; ++r) {
      row.push_back(r);
      segment.push_back(s);
    }
    begin.push_back(int64_t(row.size()));
  }
  std::iota(place.begin(), place.end(), 0);
  std::stable_sort(place.begin(), place.end(),
                   [&](int64_t a, int64_t b) { return ids[row[a]] < ids[row[b]]; });
  std::vector<int64_t> sorted;
  for (const int64_t p : place) sorted.push_back(ids[row[p]]);
  const check::Fenced<int64_t> of_ids(sorted), of_place(place), of_row(row), of_segment(segment),
      of_walk(begin);
  const bool in_place = std::is_sorted(row.begin(), row.end());
  const gradnorm::SortedLookup lookup = {
      of_ids.data(),     of_place.data(), in_place ? nullptr : of_row.data(),
      of_segment.data(), of_walk.data(),  rows};

  const int64_t table = grouped.output_count * vocabulary * d;
  const std::string what = std::string(check::name_of<T>()) + ", " + one.what + ", " +
                           std::to_string(d) + (padding_idx < 0 ? "" : ", with padding");
  const std::function<std::vector<A>()> run = [&] {
    const check::Fenced<A> out(columns + table), alone(columns);
    std::fill_n(out.data(), columns + table, A(0)), std::fill_n(alone.data(), columns, A(0));
    const check::Fenced<A> workspace(
        gradnorm::lookup_wgrad_workspace(g.data(), stride, rows, d, segments));
    const A* weight = weights.size() ? weights.data() : nullptr;
    gradnorm::lookup_wgrad_cuda<T>(lookup, g.data(), stride, d, vocabulary, segments, weight,
                                   padding_idx, out.data() + columns, out.data(), workspace.data(),
                                   nullptr);
    gradnorm::lookup_wgrad_cuda<T>(lookup, g.data(), stride, d, vocabulary, segments, weight,
                                   padding_idx, nullptr, alone.data(), workspace.data(), nullptr);
    check::failures += std::memcmp(out.data(), alone.data(), columns * sizeof(A)) != 0;
    return out.values();
  };
  const std::vector<A> found = check::in_every_order(what, run);

  std::vector<double> expected_dw, expected;
  const auto gradient = [&](int64_t s) {
    std::vector<double> of_one(vocabulary * d);
    for (int64_t r = grouped.offsets[s]; r < grouped.offsets[s + 1]; ++r) {
      if (ids[r] == padding_idx) continue;
      for (int64_t i = 0; i < d; ++i) of_one[ids[r] * d + i] += check::value_of(g[r * stride + i]);
    }
    return of_one;
  };
  grouped.expect(vocabulary * d, gradient, true, &expected_dw, &expected);
  check::close(what + ": dw", std::vector<A>(found.begin() + columns, found.end()), expected_dw,
               64);
  check::close(what + ": sqnorm", std::vector<A>(found.begin(), found.begin() + columns), expected,
               64);
}

template <typename T>
void test_all() {
  constexpr bool kIsHalf = sizeof(T) == 2;  // of these a case or two, to see that they are widened
  for (const check::Case& one : check::cases()) {
    const bool is_long = one.grouped.lengths.size() == 4;  // 1070 rows, a block each
    if (!is_long) test<T>(one, 5, 5, 6, -1);
    if (!kIsHalf) test<T>(one, 19, 24, 6, 2);
  }
  const check::Case nested = check::cases()[3];
  test<T>(nested, 32 * 16 / sizeof(T) + 3, 32 * 16 / sizeof(T) + 16, 4, -1);  // two stretches
  check::Case deep = nested;
  deep.what = "three levels of groups";
  deep.grouped.levels = {{2, 0, 1, 0, 2, 1, 3}, {1, 0, 0, 0, 1, 0, 2}, {0, 0, 0, 0, 0, 0, 1}};
  test<T>(deep, 7, 7, 5, -1);
}

}  // namespace

int main() {
  test_all<float>();
  test_all<double>();
  test_all<check::Half>();
  test_all<check::BFloat16>();
  return check::failures != 0;
}
