// segment_std_cuda on the CPU, both ways, against segment_std_cpu and figures worked out by hand.
#include <numeric>

#include "../../../csrc/kernels/cpu/segment_std.cpp"
#include "emulated.h"
#include "kernels/cuda/segment_std.cu"

namespace {

enum class Way { kCpu, kIds, kSorted };

// mean, std, low, high, count, one after the other.
template <typename T>
std::vector<T> figures(Way way, const check::Fenced<T>& values, const check::Fenced<int64_t>& ids,
                       int64_t segments, int64_t ddof) {
  const int64_t n = values.size();
  const check::Fenced<T> figures(4 * segments);
  const check::Fenced<int64_t> count(segments);
  T* out = figures.data();
  const gradnorm::SegmentStd<T> to = {out, out + segments, count.data(), out + 2 * segments,
                                      out + 3 * segments};
  std::vector<int64_t> rising(segments + 1), places(n);
  for (int64_t i = 0; i < n; ++i) ++rising[ids[i] + 1];
  std::partial_sum(rising.begin(), rising.end(), rising.begin());
  std::iota(places.begin(), places.end(), 0);
  std::stable_sort(places.begin(), places.end(),
                   [&](int64_t a, int64_t b) { return ids[a] < ids[b]; });
  const check::Fenced<int64_t> offsets(rising), order(places);
  emulator::launches = 0;
  if (way == Way::kCpu) {
    gradnorm::segment_std_cpu<T>(values.data(), ids.data(), n, segments, ddof, to);
  } else if (way == Way::kIds) {
    gradnorm::segment_std_cuda<T>(values.data(), ids.data(), n, segments, ddof, to, nullptr);
  } else {
    gradnorm::segment_std_sorted_cuda<T>(values.data(), order.data(), offsets.data(), n, segments,
                                         ddof, to, nullptr);
  }
  check::failures += emulator::launches > 1;
  std::vector<T> all = figures.values();
  for (int64_t s = 0; s < segments; ++s) all.push_back(T(count[s]));
  return all;
}

template <typename T>
void test(const std::string& what, const std::vector<double>& given,
          const std::vector<int64_t>& given_ids, int64_t segments, int64_t ddof) {
  const check::Fenced<T> values(std::vector<T>(given.begin(), given.end()));
  const check::Fenced<int64_t> ids(given_ids);
  const std::vector<T> by_cpu = figures(Way::kCpu, values, ids, segments, ddof);
  const std::vector<double> expected(by_cpu.begin(), by_cpu.end());
  for (const Way way : {Way::kIds, Way::kSorted}) {
    const std::function<std::vector<T>()> run = [&] {
      return figures(way, values, ids, segments, ddof);
    };
    check::close(what + (way == Way::kIds ? ", by ids" : ", sorted"),
                 check::in_every_order(what, run), expected, 4);
  }
}

template <typename T>
void test_all() {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  test<T>("no segments", {}, {}, 0, 1);
  test<T>("no values", {}, {}, 3, 1);
  test<T>("in any order, one value, an empty segment", {1, 5, 3, 7}, {0, 1, 0, 3}, 4, 1);
  test<T>("a small spread far from zero", {1048576, 1048577, 1048578}, {0, 0, 0}, 1, 1);
  test<T>("a NaN stays in its segment", {1, nan, 2, 5, 3}, {0, 0, 0, 1, 1}, 2, 0);
  std::vector<double> values;
  std::vector<int64_t> ids;
  std::mt19937 random(0);
  for (int i = 0; i < 1500; ++i) {
    values.push_back(double(random() % 1000) / 7 + 1000);
    ids.push_back(random() % 3);
  }
  test<T>("long segments", values, ids, 3, 1);
  test<T>("many segments, most of them empty", values, ids, 37, 1);

  const check::Fenced<T> equal(std::vector<T>(300, T(0.1)));
  const check::Fenced<int64_t> same(std::vector<int64_t>(300, 0));
  for (const Way way : {Way::kIds, Way::kSorted}) {
    const std::vector<T> found = figures(way, equal, same, 1, 1);
    check::failures += found[0] != T(0.1) || found[1] != 0 || found[2] != found[3];
  }
}

}  // namespace

int main() {
  test_all<float>();
  test_all<double>();
  return check::failures != 0;
}
