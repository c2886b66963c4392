// A mean first and deviations from it then: sums of squares minus squared sums would call a group
// of equal rewards noisy. Neighbours mostly share a prompt, so sums are formed run by run, in
// registers. Where ids ascend a run is a whole prompt: one walk goes through every array once, and
// both passes look at a prompt while it is in the cache.
#include "kernels/reward_stats.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace gradnorm {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// How many distinct ids there are, if they ascend; else -1.
int64_t count_ascending(const int64_t* ids, int64_t n) {
  int64_t distinct = n > 0, falls = 0;
  for (int64_t i = 1; i < n; ++i) {
    distinct += ids[i] != ids[i - 1];
    falls += ids[i] < ids[i - 1];
  }
  return falls == 0 ? distinct : -1;
}

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

struct Group {
  double sum = 0, low = kInfinity, high = -kInfinity, squares = 0, fourth = 0;
  int64_t count = 0;
  bool has_nan = false;

  bool constant() const { return !has_nan && low == high; }
  double mean() const { return constant() ? low : sum / double(count); }  // 0.9 + 0.9 + ... rounds
};

template <typename Real>
void add(const Real* rewards, int64_t begin, int64_t end, Group& all) {
  double sum = 0, low = kInfinity, high = -kInfinity;
  for (int64_t i = begin; i < end; ++i) {
    const double reward = rewards[i];
    sum += reward;
    low = reward < low ? reward : low;
    high = reward > high ? reward : high;
  }
  all.sum += sum;
  all.low = std::min(all.low, low);
  all.high = std::max(all.high, high);
  all.count += end - begin;
  if (!std::isnan(sum)) return;  // infinities of both signs add up to NaN as well
  all.has_nan |= std::any_of(rewards + begin, rewards + end, [](Real r) { return std::isnan(r); });
}

template <typename Real>
void add_deviations(const Real* rewards, int64_t begin, int64_t end, Group& all) {
  const double mean = all.mean();
  double squares = 0, fourth = 0;
  for (int64_t i = begin; i < end; ++i) {
    const double square = (rewards[i] - mean) * (rewards[i] - mean);
    squares += square;
    fourth += square * square;
  }
  all.squares += squares;
  all.fourth += fourth;
}

// The 10th percentile, interpolated linearly between neighbours in rank.
double tenth_percentile(std::vector<double>& values) {
  if (values.empty()) return kNaN;
  const double rank = 0.1 * double(values.size() - 1);
  const auto below = values.begin() + static_cast<int64_t>(rank);
  std::nth_element(values.begin(), below, values.end());
  if (below + 1 == values.end()) return *below;
  const double next = *std::min_element(below + 1, values.end());
  return *below + (rank - std::floor(rank)) * (next - *below);
}

struct Task {
  Group rewards;
  int64_t prompts = 0, zero_std = 0, all_best = 0, all_worst = 0;
  std::vector<double> stds;
};

// The figures of prompt p, and what it adds to its task.
void finish(const Group& group, int64_t p, int64_t ddof, RewardStats& out, Task& task) {
  const double size = double(group.count), mean = group.mean();
  const bool zero_std = group.constant() && group.count >= 2;
  const double variance = group.count > 1 ? group.squares / (size - 1) : kNaN;
  const double s = std::sqrt(variance);
  const double of_variance =
      (group.fourth / size - variance * variance * (size - 3) / (size - 1)) / size;
  const double shrink = ddof == 0 ? std::sqrt((size - 1) / size) : 1;
  out.count[p] = group.count;
  out.mean[p] = mean;
  out.std[p] = zero_std || (group.constant() && ddof == 0) ? 0 : s * shrink;
  // Of a NaN no maximum is taken: a comparison would lose it.
  out.std_error[p] =
      !(s > 0) ? kNaN : std::sqrt(of_variance < 0 ? 0 : of_variance) / (2 * s) * shrink;
  out.zero_std[p] = zero_std;

  task.rewards.sum += group.sum;
  task.rewards.low = std::min(task.rewards.low, group.low);
  task.rewards.high = std::max(task.rewards.high, group.high);
  task.rewards.has_nan |= group.has_nan;
  task.rewards.count += group.count;
  task.prompts += 1;
  task.zero_std += zero_std;
  if (group.count > ddof) task.stds.push_back(out.std[p]);
}

void resize(RewardStats& out, int64_t prompts) {
  for (auto* ids : {&out.prompt, &out.task, &out.count}) ids->resize(prompts);
  for (auto* figures : {&out.mean, &out.std, &out.std_error}) figures->resize(prompts);
  for (auto* flags : {&out.zero_std, &out.all_best, &out.all_worst}) flags->resize(prompts);
}

// Prompts whose ids ascend. Whether each lies in one task; if not, out.torn is set.
template <typename Real>
bool walk(const Real* rewards, const int64_t* ids, const int64_t* tasks, int64_t n, int64_t ddof,
          RewardStats& out, std::vector<Task>& of_task) {
  int64_t* place = out.prompt_of.get();
  for (int64_t begin = 0, end, p = 0; begin < n; begin = end, ++p) {
    const int64_t id = ids[begin];
    for (end = begin; end < n && ids[end] == id; ++end) place[end] = p;
    const int64_t task = tasks ? tasks[begin] : 0;
    for (int64_t i = begin; tasks && i < end; ++i) {
      if (tasks[i] == task) continue;
      out.torn = i;
      return false;
    }
    Group group;
    add(rewards, begin, end, group);
    add_deviations(rewards, begin, end, group);
    out.prompt[p] = id;
    out.task[p] = task;
    finish(group, p, ddof, out, of_task[task]);
  }
  return true;
}

// Prompts in any order.
template <typename Real>
bool gather(const Real* rewards, const int64_t* tasks, int64_t n, int64_t ddof, RewardStats& out,
            std::vector<Task>& of_task) {
  const int64_t* place = out.prompt_of.get();
  const int64_t prompts = static_cast<int64_t>(out.prompt.size());
  out.task.assign(prompts, tasks ? -1 : 0);
  for (int64_t i = 0; tasks && i < n; ++i) {
    int64_t& task = out.task[place[i]];
    if (task >= 0 && task != tasks[i]) {
      out.torn = i;
      return false;
    }
    task = tasks[i];
  }
  std::vector<Group> groups(prompts);
  const auto for_runs = [&](const auto& body) {
    for (int64_t begin = 0, end; begin < n; begin = end) {
      for (end = begin + 1; end < n && place[end] == place[begin];) ++end;
      body(rewards, begin, end, groups[place[begin]]);
    }
  };
  for_runs(add<Real>);
  for_runs(add_deviations<Real>);
  for (int64_t p = 0; p < prompts; ++p) finish(groups[p], p, ddof, out, of_task[out.task[p]]);
  return true;
}

}  // namespace

template <typename Real>
RewardStats reward_stats_cpu(const Real* rewards, const int64_t* prompts, const int64_t* tasks,
                             int64_t n, int64_t n_tasks, int64_t ddof) {
  RewardStats out;
  out.prompt_of.reset(new int64_t[n]);  // not filled: every place is written once
  std::vector<Task> of_task(n_tasks);
  const int64_t ascending = count_ascending(prompts, n);
  if (ascending < 0) find_prompts(prompts, n, out.prompt, out.prompt_of.get());
  resize(out, ascending < 0 ? static_cast<int64_t>(out.prompt.size()) : ascending);
  const bool whole = ascending < 0 ? gather(rewards, tasks, n, ddof, out, of_task)
                                   : walk(rewards, prompts, tasks, n, ddof, out, of_task);
  if (!whole) return out;

  double lowest = kInfinity, highest = -kInfinity;
  int64_t live = 0;
  bool any_nan = false;
  for (const Task& task : of_task) {
    lowest = std::min(lowest, task.rewards.low);
    highest = std::max(highest, task.rewards.high);
    live += task.prompts - task.zero_std;
    any_nan |= task.rewards.has_nan;
  }
  const int64_t n_prompts = static_cast<int64_t>(out.prompt.size());
  for (int64_t p = 0; p < n_prompts && lowest < highest; ++p) {
    if (!out.zero_std[p]) continue;
    Task& task = of_task[out.task[p]];
    task.all_best += out.all_best[p] = out.mean[p] == highest;
    task.all_worst += out.all_worst[p] = out.mean[p] == lowest;
  }
  for (Task& task : of_task) {
    const double size = double(task.prompts), scale = task.rewards.has_nan ? kNaN : 1;
    double sum = 0;
    for (const double each : task.stds) sum += each;
    out.task_mean.push_back(scale * task.rewards.mean());
    out.task_std_mean.push_back(scale * (sum / double(task.stds.size())));
    out.task_std_p10.push_back(task.rewards.has_nan ? kNaN : tenth_percentile(task.stds));
    out.task_zero_std_share.push_back(scale * (double(task.zero_std) / size));
    out.task_all_best_share.push_back(scale * (double(task.all_best) / size));
    out.task_all_worst_share.push_back(scale * (double(task.all_worst) / size));
    out.task_share.push_back(size / double(n_prompts));
    out.task_realised_share.push_back(
        any_nan ? kNaN : double(task.prompts - task.zero_std) / double(live));
  }
  return out;
}

template RewardStats reward_stats_cpu<float>(const float*, const int64_t*, const int64_t*, int64_t,
                                             int64_t, int64_t);
template RewardStats reward_stats_cpu<double>(const double*, const int64_t*, const int64_t*,
                                              int64_t, int64_t, int64_t);

}  // namespace gradnorm
