// segment_std_cpu against figures worked out by hand.
#include "check.h"
#include "kernels/segment_std.h"

namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Expected {
  std::vector<double> mean, std, low, high;
  std::vector<int64_t> count;
};

template <typename T>
void test(const std::string& what, const std::vector<double>& values,
          const std::vector<int64_t>& ids, int64_t ddof, const Expected& expected) {
  const int64_t segments = static_cast<int64_t>(expected.count.size());
  const std::vector<T> typed(values.begin(), values.end());
  std::vector<T> mean(segments), std(segments), low(segments), high(segments);
  std::vector<int64_t> count(segments);
  gradnorm::segment_std_cpu<T>(typed.data(), ids.data(), static_cast<int64_t>(typed.size()),
                               segments, ddof,
                               {mean.data(), std.data(), count.data(), low.data(), high.data()});
  check::close(what + ": mean", mean, expected.mean, 2);
  check::close(what + ": std", std, expected.std, 2);
  check::close(what + ": low", low, expected.low, 0);
  check::close(what + ": high", high, expected.high, 0);
  const bool ok = count == expected.count;
  std::printf("%s: %s: count\n", ok ? "ok" : "FAIL", what.c_str());
  check::failures += !ok;
}

template <typename T>
void test_all() {
  test<T>("no segments", {}, {}, 1, {{}, {}, {}, {}, {}});
  test<T>("ids in any order, one value, an empty segment", {1, 5, 3, 7}, {0, 1, 0, 3}, 1,
          {{2, 5, kNaN, 7},
           {std::sqrt(2.0), kNaN, kNaN, kNaN},
           {1, 5, kInfinity, 7},
           {3, 5, -kInfinity, 7},
           {2, 1, 0, 1}});
  test<T>("the population's deviation", {1, 3, 4}, {0, 0, 1}, 0,
          {{2, 4}, {1, 0}, {1, 4}, {3, 4}, {2, 1}});
  test<T>("a small spread far from zero", {1048576, 1048577, 1048578}, {0, 0, 0}, 1,
          {{1048577}, {1}, {1048576}, {1048578}, {3}});
  test<T>("equal values have no deviation at all", {0.1, 0.1, 0.1}, {0, 0, 0}, 1,
          {{double(T(0.1))}, {0}, {double(T(0.1))}, {double(T(0.1))}, {3}});
  test<T>("a NaN stays in its segment", {1, kNaN, 2, 5, 3}, {0, 0, 0, 1, 1}, 1,
          {{kNaN, 4}, {kNaN, std::sqrt(2.0)}, {kNaN, 3}, {kNaN, 5}, {3, 2}});
}

}  // namespace

int main() {
  test_all<float>();
  test_all<double>();
  return check::failures != 0;
}
