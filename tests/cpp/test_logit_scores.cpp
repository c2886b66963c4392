// logit_scores_cpu against the softmax in long double, one logit at a time.
#include "check.h"
#include "kernels/logit_scores.h"

namespace {

constexpr int64_t kIgnored = -100;

template <typename T>
void test(const std::string& what, const std::vector<T>& logits, int64_t vocabulary, int64_t stride,
          const std::vector<int64_t>& labels) {
  const int64_t rows = static_cast<int64_t>(labels.size());
  std::vector<double> log_probability(rows), w(rows);
  for (int64_t r = 0; r < rows; ++r) {
    if (labels[r] == kIgnored) continue;
    const T* row = logits.data() + r * stride;
    long double top = row[0], others = 0, squares = 0;
    for (int64_t v = 1; v < vocabulary; ++v) top = std::fmax(top, (long double)row[v]);
    for (int64_t v = 0; v < vocabulary; ++v) {
      if (v == labels[r]) continue;
      const long double e = std::exp((long double)row[v] - top);
      others += e;
      squares += e * e;
    }
    const long double below = row[labels[r]] - top, total = others + std::exp(below);
    log_probability[r] = below == 0 ? -std::log1p(others) : below - std::log(total);
    w[r] = (others * others + squares) / (total * total);
  }
  std::vector<T> got_log(rows), got_w(rows);
  gradnorm::logit_scores_cpu<T>(logits.data(), stride, labels.data(), rows, vocabulary, kIgnored,
                                got_log.data(), got_w.data(), check::naive_host<T>());
  check::close(what + ": log-probability", got_log, log_probability, 4);
  check::close(what + ": w", got_w, w, 16);
}

template <typename T>
void test_all() {
  const double inf = std::numeric_limits<double>::infinity();
  const double nan = std::numeric_limits<double>::quiet_NaN();
  test<T>("two classes", {0, 0, 3, 0}, 2, 2, {0, 1});
  test<T>("one class", {5, 7}, 1, 1, {0, 0});
  test<T>("the label first, last and in between; one ignored", {1, 2, 3, 3, 2, 1, 0, 4, 0, 9, 9, 9},
          3, 3, {0, 2, 1, kIgnored});
  test<T>("rows apart", {1, 2, 99, 2, 1, 99}, 2, 3, {0, 1});
  test<T>("sure of itself", {20, 0, 0}, 3, 3, {0});
  test<T>("sure and wrong", {200, 0, -200}, 3, 3, {1});
  test<T>("far from zero", {T(1e4), T(1e4) + 1, T(1e4) - 1}, 3, 3, {2});
  test<T>("a class that is masked", {1, T(-inf), 2}, 3, 3, {2});
  test<T>("not a number", {1, T(nan), 2}, 3, 3, {2});
  for (const int64_t vocabulary : {7, 8, 15, 16, 17, 2047, 2048, 2049, 5000}) {
    test<T>(std::to_string(vocabulary) + " classes", check::random_rows<T>(3 * vocabulary, 1),
            vocabulary, vocabulary, {0, vocabulary - 1, vocabulary / 2});
  }
}

}  // namespace

int main() {
  test_all<float>();
  test_all<double>();
  return check::failures != 0;
}
