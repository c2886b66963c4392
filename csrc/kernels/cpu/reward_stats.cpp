// A mean first and deviations from it then: sums of squares minus squared sums would call a group
// of equal rewards noisy. Where ids ascend, one walk goes through every array once, and both passes
// look at a prompt while it is in the cache; else the rewards are sorted by prompt first.
#include "kernels/reward_stats.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

namespace gradnorm {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The distinct ids in ascending order, and each example's place among them.
void find_prompts(const int64_t* ids, int64_t n, std::vector<int64_t>& distinct, int64_t* place) {
  const auto [low, high] = std::minmax_element(ids, ids + n);
  const uint64_t first = uint64_t(*low), range = uint64_t(*high) - first;  // wraps to the right one
  if (range < uint64_t(4 * n) + 1024) {  // a table, instead of sorting
    std::vector<int64_t> table(range + 1, 0);
    for (int64_t i = 0; i < n; ++i) table[uint64_t(ids[i]) - first] = 1;
    for (uint64_t id = 0; id <= range; ++id) {
      if (table[id] == 0) continue;
      table[id] = static_cast<int64_t>(distinct.size());
      distinct.push_back(int64_t(first + id));
    }
    for (int64_t i = 0; i < n; ++i) place[i] = table[uint64_t(ids[i]) - first];
    return;
  }
  distinct.assign(ids, ids + n);
  std::sort(distinct.begin(), distinct.end());
  distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
  for (int64_t i = 0; i < n; ++i) {
    place[i] = i > 0 && ids[i] == ids[i - 1]
                   ? place[i - 1]
                   : std::lower_bound(distinct.begin(), distinct.end(), ids[i]) - distinct.begin();
  }
}

// Drops values that have neither this rank nor the next one; the rank among those left. Counted by
// the first bits, which rise with a number >= 0, nearly all go in two passes without a guess.
int64_t narrow(std::vector<double>& values, int64_t rank) {
  constexpr uint64_t kBuckets = 1024;
  const auto [least, most] = std::minmax_element(values.begin(), values.end());
  const uint64_t low = std::bit_cast<uint64_t>(*least),
                 range = std::bit_cast<uint64_t>(*most) - low;
  int shift = 0;
  while (range >> shift >= kBuckets) ++shift;
  const auto bucket = [=](double value) { return (std::bit_cast<uint64_t>(value) - low) >> shift; };
  int64_t counts[kBuckets] = {}, below = 0;
  for (const double value : values) ++counts[bucket(value)];
  uint64_t first = 0;
  while (below + counts[first] <= rank) below += counts[first++];
  uint64_t last = first + 1;
  while (last < kBuckets && counts[last] == 0) ++last;
  std::erase_if(values,
                [=](double value) { return bucket(value) < first || bucket(value) > last; });
  return rank - below;
}

// The 10th percentile, interpolated linearly between neighbours in rank.
double tenth_percentile(std::vector<double>& values) {
  if (values.empty()) return kNaN;
  const double rank = 0.1 * double(values.size() - 1);
  int64_t whole = static_cast<int64_t>(rank);
  if (values.size() > 4096) whole = narrow(values, whole);
  const auto below = values.begin() + whole;
  std::nth_element(values.begin(), below, values.end());
  if (below + 1 == values.end()) return *below;
  const double next = *std::min_element(below + 1, values.end());
  return *below + (rank - std::floor(rank)) * (next - *below);
}

struct Task {
  double sum = 0, first = kNaN;  // the first prompt's mean, and every prompt's where it is constant
  int64_t examples = 0, prompts = 0, zero_std = 0, all_best = 0, all_worst = 0;
  bool constant = true, has_nan = false;
  std::vector<double> stds;
};

// 16 bytes fit any vector register, and groups are small.
template <typename Real>
struct Lanes {
  static constexpr int64_t kCount = 16 / sizeof(Real);
  typedef Real Vector __attribute__((vector_size(kCount * sizeof(Real))));
  typedef double Wide __attribute__((vector_size(kCount * sizeof(double))));
};

// The figures of prompts, which are added in ascending order of their ids.
template <typename Real>
class Figures {
 public:
  Figures(int64_t n_tasks, int64_t ddof)
      : limit_(n_tasks > 0 ? n_tasks : uint64_t{1} << 63), ddof_(ddof), tasks_(n_tasks) {}

  bool allow(int64_t task) const { return uint64_t(task) < limit_; }

  void refuse(int64_t example) { out_.refused = example; }

  void add(const Real* rewards, int64_t count, int64_t prompt, int64_t task) {
    if (uint64_t(task) >= tasks_.size()) tasks_.resize(uint64_t(task) + 1);
    out_.prompt.push_back(prompt);
    out_.task.push_back(task);
    out_.count.push_back(count);
    add_up(rewards, count);
    add_deviations(rewards, count);
    if (std::isnan(sum_[pending_])) {  // infinities of both signs add up to NaN as well
      const auto is_nan = [](Real reward) { return std::isnan(reward); };
      tasks_[task].has_nan |= std::any_of(rewards, rewards + count, is_nan);
    }
    if (++pending_ == kBlock) finish_block();
  }

  RewardStats<Real> finish(std::unique_ptr<int64_t[]> prompt_of) {
    if (out_.refused >= 0) return std::move(out_);
    finish_block();
    out_.prompt_of = std::move(prompt_of);
    mark_best_and_worst();
    int64_t live = 0;
    bool any_nan = false;
    for (const Task& task : tasks_) {
      live += task.prompts - task.zero_std;
      any_nan |= task.has_nan;
    }
    for (Task& task : tasks_) {
      const double size = double(task.prompts), scale = task.has_nan ? kNaN : 1;
      const double mean = task.constant ? task.first : task.sum / double(task.examples);
      const double stds = scale * std::accumulate(task.stds.begin(), task.stds.end(), 0.0);
      out_.task_mean.push_back(Real(scale * mean));
      out_.task_std_mean.push_back(Real(stds / double(task.stds.size())));
      out_.task_std_p10.push_back(Real(std::isnan(stds) ? kNaN : tenth_percentile(task.stds)));
      out_.task_zero_std_share.push_back(Real(scale * (double(task.zero_std) / size)));
      out_.task_all_best_share.push_back(Real(scale * (double(task.all_best) / size)));
      out_.task_all_worst_share.push_back(Real(scale * (double(task.all_worst) / size)));
      out_.task_share.push_back(Real(size / double(out_.prompt.size())));
      out_.task_realised_share.push_back(
          Real(any_nan ? kNaN : double(task.prompts - task.zero_std) / double(live)));
    }
    return std::move(out_);
  }

 private:
  static constexpr int64_t kLanes = Lanes<Real>::kCount;
  using Reals = typename Lanes<Real>::Vector;
  using Doubles = typename Lanes<Real>::Wide;

  static void load(const Real* from, Reals* to) { std::memcpy(to, from, sizeof *to); }

  static double total(const Doubles& lanes) {
    double sum = lanes[0];
    for (int64_t lane = 1; lane < kLanes; ++lane) sum += lanes[lane];
    return sum;
  }

  void add_up(const Real* rewards, int64_t count) {
    const Real first = rewards[0];
    Doubles sums = {};
    auto equal = Reals{} == Reals{};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      Reals r;
      load(rewards + i, &r);
      sums += __builtin_convertvector(r, Doubles);
      equal &= r == first;
      low_ = r < low_ ? r : low_;  // a NaN is left out
      high_ = r > high_ ? r : high_;
    }
    double sum = total(sums);
    bool constant = true;
    for (int64_t lane = 0; lane < kLanes; ++lane) constant &= equal[lane] != 0;
    for (; i < count; ++i) {
      const Real r = rewards[i];
      sum += r;
      constant &= r == first;
      low_[0] = r < low_[0] ? r : low_[0];
      high_[0] = r > high_[0] ? r : high_[0];
    }
    size_[pending_] = double(count);
    sum_[pending_] = sum;
    constant_[pending_] = constant;
    mean_[pending_] = constant ? first : sum / double(count);  // 0.9 + 0.9 + ... rounds
  }

  void add_deviations(const Real* rewards, int64_t count) {
    const double mean = mean_[pending_];
    Doubles squares = {}, fourths = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      Reals r;
      load(rewards + i, &r);
      const Doubles deviation = __builtin_convertvector(r, Doubles) - mean;
      const Doubles square = deviation * deviation;
      squares += square;
      fourths += square * square;
    }
    double sum = total(squares), fourth = total(fourths);
    for (; i < count; ++i) {
      const double square = (rewards[i] - mean) * (rewards[i] - mean);
      sum += square;
      fourth += square * square;
    }
    squares_[pending_] = sum;
    fourth_[pending_] = fourth;
  }

  void finish_block() {
    for (int64_t p = 0; p < pending_; ++p) {  // several at a time: quotients and roots take long
      const double size = size_[p], variance = squares_[p] / (size - 1);  // NaN of a group of one
      const double s = std::sqrt(variance);
      const double of_variance =
          (fourth_[p] / size - variance * variance * (size - 3) / (size - 1)) / size;
      const double shrink = ddof_ == 0 ? std::sqrt((size - 1) / size) : 1;
      // Of a NaN no maximum is taken: a comparison would lose it.
      const double error = std::sqrt(of_variance < 0 ? 0 : of_variance) / (2 * s) * shrink;
      std_[p] = s * shrink;
      std_error_[p] = s > 0 ? error : kNaN;
    }
    const int64_t* task_of = out_.task.data() + out_.mean.size();
    for (int64_t p = 0; p < pending_; ++p) {
      const bool zero_std = constant_[p] && size_[p] >= 2;
      Task& task = tasks_[task_of[p]];
      if (task.prompts == 0) task.first = mean_[p];
      task.constant &= constant_[p] && mean_[p] == task.first;
      task.sum += sum_[p];
      task.examples += static_cast<int64_t>(size_[p]);
      task.prompts += 1;
      task.zero_std += zero_std;
      out_.zero_std.push_back(zero_std);
      if (size_[p] <= double(ddof_)) continue;
      if (constant_[p]) std_[p] = 0;
      task.stds.push_back(std_[p]);
    }
    out_.mean.insert(out_.mean.end(), mean_, mean_ + pending_);
    out_.std.insert(out_.std.end(), std_, std_ + pending_);
    out_.std_error.insert(out_.std_error.end(), std_error_, std_error_ + pending_);
    pending_ = 0;
  }

  void mark_best_and_worst() {
    Real lowest = low_[0], highest = high_[0];
    for (int64_t lane = 1; lane < kLanes; ++lane) {
      lowest = std::min<Real>(lowest, low_[lane]);
      highest = std::max<Real>(highest, high_[lane]);
    }
    const size_t prompts = out_.prompt.size();
    for (auto* flags : {&out_.all_best, &out_.all_worst}) flags->resize(prompts);
    for (size_t p = 0; p < prompts && lowest < highest; ++p) {
      if (!out_.zero_std[p]) continue;
      Task& task = tasks_[out_.task[p]];
      task.all_best += out_.all_best[p] = out_.mean[p] == highest;
      task.all_worst += out_.all_worst[p] = out_.mean[p] == lowest;
    }
  }

  uint64_t limit_;
  int64_t ddof_;
  std::vector<Task> tasks_;
  RewardStats<Real> out_;
  Reals low_ = Reals{} + Real(kInfinity), high_ = Reals{} - Real(kInfinity);  // of the batch

  // Of the last prompts, which are not finished.
  static constexpr int64_t kBlock = 128;
  int64_t pending_ = 0;
  double size_[kBlock], sum_[kBlock], mean_[kBlock], squares_[kBlock], fourth_[kBlock],
      std_[kBlock], std_error_[kBlock];
  bool constant_[kBlock];  // all rewards are equal
};

// Whether the ids ascend. If so, adds their prompts, up to an example that is refused.
template <typename Real>
bool add_ascending(const Real* rewards, const int64_t* ids, const int64_t* tasks, int64_t n,
                   int64_t* place, Figures<Real>& figures) {
  constexpr int64_t kAhead = 256, kLine = 8;  // the hardware does not foresee all these streams
  int64_t fetched = 0;
  for (int64_t begin = 0, end, p = 0; begin < n; begin = end, ++p) {
    for (; fetched < std::min(n, begin + kAhead); fetched += kLine) {
      __builtin_prefetch(ids + fetched);
      __builtin_prefetch(rewards + fetched);
      __builtin_prefetch(place + fetched, 1);
      if (tasks) __builtin_prefetch(tasks + fetched);
    }
    const int64_t id = ids[begin], task = tasks ? tasks[begin] : 0;
    if (begin > 0 && id < ids[begin - 1]) return false;
    int64_t differs = 0;
    for (end = begin; end < n && ids[end] == id; ++end) {
      place[end] = p;
      if (tasks) differs |= tasks[end] ^ task;
    }
    const auto is_wrong = [&](int64_t k) { return k != task || !figures.allow(k); };
    if (differs != 0 || is_wrong(task)) {
      figures.refuse(std::find_if(tasks + begin, tasks + end, is_wrong) - tasks);
      return true;
    }
    figures.add(rewards + begin, end - begin, id, task);
  }
  return true;
}

// Adds the prompts, whose ids come in any order, unless an example is refused.
template <typename Real>
void add_sorted(const Real* rewards, const int64_t* ids, const int64_t* tasks, int64_t n,
                int64_t* place, Figures<Real>& figures) {
  std::vector<int64_t> prompts;
  find_prompts(ids, n, prompts, place);
  std::vector<int64_t> task(prompts.size(), tasks ? -1 : 0), end(prompts.size(), 0);
  for (int64_t i = 0; i < n; ++i) {
    ++end[place[i]];
    if (!tasks) continue;
    int64_t& of_prompt = task[place[i]];
    if (!figures.allow(tasks[i]) || (of_prompt >= 0 && of_prompt != tasks[i])) {
      return figures.refuse(i);
    }
    of_prompt = tasks[i];
  }
  std::exclusive_scan(end.begin(), end.end(), end.begin(), int64_t{0});
  const std::unique_ptr<Real[]> sorted(new Real[n]);
  for (int64_t i = 0; i < n; ++i) sorted[end[place[i]]++] = rewards[i];
  for (size_t p = 0; p < prompts.size(); ++p) {
    const int64_t begin = p > 0 ? end[p - 1] : 0;
    figures.add(&sorted[begin], end[p] - begin, prompts[p], task[p]);
  }
}

}  // namespace

template <typename Real>
RewardStats<Real> reward_stats_cpu(const Real* rewards, const int64_t* prompts,
                                   const int64_t* tasks, int64_t n, int64_t n_tasks, int64_t ddof) {
  std::unique_ptr<int64_t[]> place(new int64_t[n]);  // not filled: every place is written once
  if (Figures<Real> figures(n_tasks, ddof);
      add_ascending(rewards, prompts, tasks, n, place.get(), figures)) {
    return figures.finish(std::move(place));
  }
  Figures<Real> figures(n_tasks, ddof);
  add_sorted(rewards, prompts, tasks, n, place.get(), figures);
  return figures.finish(std::move(place));
}

template RewardStats<float> reward_stats_cpu(const float*, const int64_t*, const int64_t*, int64_t,
                                             int64_t, int64_t);
template RewardStats<double> reward_stats_cpu(const double*, const int64_t*, const int64_t*,
                                              int64_t, int64_t, int64_t);

}  // namespace gradnorm
