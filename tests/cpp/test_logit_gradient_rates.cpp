// logit_gradient_rates_cpu against the softmax in double, one logit at a time.
#include "check.h"
#include "kernels/logit_gradient_rates.h"

namespace {

constexpr int64_t kIgnored = -100;

template <typename T>
void test(const std::string& what, const std::vector<T>& logits, int64_t vocabulary,
          const std::vector<int64_t>& labels, int64_t threads = 1) {
  const int64_t rows = static_cast<int64_t>(labels.size());
  // Not from zero: sums go on from what is there.
  std::vector<double> up(vocabulary, 2), down(vocabulary, 3), got_up = up, got_down = down;
  std::vector<int64_t> count(vocabulary, 5), got_count = count;
  for (int64_t r = 0; r < rows; ++r) {
    if (labels[r] == kIgnored) continue;
    const T* row = logits.data() + r * vocabulary;
    double top = row[0], total = 0;
    for (int64_t v = 1; v < vocabulary; ++v) top = std::fmax(top, double(row[v]));
    for (int64_t v = 0; v < vocabulary; ++v) total += std::exp(double(row[v]) - top);
    for (int64_t v = 0; v < vocabulary; ++v) {
      const double p = std::exp(double(row[v]) - top) / total;
      if (v == labels[r]) continue;
      down[v] += p;
      up[labels[r]] += p;
    }
    count[labels[r]] += 1;
  }
  gradnorm::logit_gradient_rates_cpu<T>(logits.data(), vocabulary, labels.data(), rows, vocabulary,
                                        kIgnored, got_count.data(), got_up.data(), got_down.data(),
                                        check::naive_host<T>(threads));
  // In roundings of T, though the sums are doubles: the probabilities are of that type.
  check::close(what + ": up", std::vector<T>(got_up.begin(), got_up.end()), up, 16);
  check::close(what + ": down", std::vector<T>(got_down.begin(), got_down.end()), down, 16);
  const bool ok = got_count == count;
  std::printf("%s: %s: count\n", ok ? "ok" : "FAIL", what.c_str());
  check::failures += !ok;
}

template <typename T>
void test_all() {
  test<T>("no rows", {}, 3, {});
  test<T>("two classes", {0, 0, 3, 0, 1, 1}, 2, {0, 1, 0});
  test<T>("one class", {5, 7}, 1, {0, 0});
  test<T>("only an ignored row", {5, 7}, 2, {kIgnored});
  for (const int64_t threads : {1, 2, 3}) {
    const int64_t rows = 300, vocabulary = 37;
    std::vector<int64_t> labels(rows);
    for (int64_t r = 0; r < rows; ++r) labels[r] = r % 11 == 0 ? kIgnored : r * 7 % vocabulary;
    test<T>("300 rows, threads " + std::to_string(threads),
            check::random_rows<T>(rows * vocabulary, 2), vocabulary, labels, threads);
  }
}

}  // namespace

int main() {
  test_all<float>();
  test_all<double>();
  return check::failures != 0;
}
