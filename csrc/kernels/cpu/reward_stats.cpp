// A mean first and deviations from it then: sums of squares minus squared sums would call a group
// of equal rewards noisy. Neighbours mostly share a prompt, so sums are formed run by run, in
// registers; where ids ascend a run is a whole prompt, and both passes look at it while it is in
// the cache.
#include "kernels/reward_stats.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace gradnorm {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Whether the ids ascend; until one does not, they are taken down as find_prompts does.
bool ascending_prompts(const int64_t* ids, int64_t n, std::vector<int64_t>& distinct,
                       std::vector<int64_t>& place) {
  for (int64_t i = 0, current = -1; i < n; ++i) {
    if (i == 0 || ids[i] != ids[i - 1]) {
      if (i > 0 && ids[i] < ids[i - 1]) return false;
      distinct.push_back(ids[i]);
      ++current;
    }
    place[i] = current;
  }
  return true;
}

// The distinct ids in ascending order, and each example's place among them. Whether they ascend.
bool find_prompts(const int64_t* ids, int64_t n, std::vector<int64_t>& distinct,
                  std::vector<int64_t>& place) {
  place.resize(n);
  if (ascending_prompts(ids, n, distinct, place)) return true;
  distinct.clear();
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
    return false;
  }
  distinct.assign(ids, ids + n);
  std::sort(distinct.begin(), distinct.end());
  distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
  for (int64_t i = 0; i < n; ++i) {
    place[i] = i > 0 && ids[i] == ids[i - 1]
                   ? place[i - 1]
                   : std::lower_bound(distinct.begin(), distinct.end(), ids[i]) - distinct.begin();
  }
  return false;
}

struct Group {
  double sum = 0, low = kInfinity, high = -kInfinity, squares = 0, fourth = 0;
  int64_t count = 0;
  bool has_nan = false;

  bool constant() const { return !has_nan && low == high; }
  double mean() const { return constant() ? low : sum / double(count); }  // 0.9 + 0.9 + ... rounds
};

// Calls body(begin, end) for every run of neighbours of one prompt.
template <typename Body>
void for_runs(const std::vector<int64_t>& place, const Body& body) {
  const int64_t n = static_cast<int64_t>(place.size());
  for (int64_t begin = 0, end; begin < n; begin = end) {
    for (end = begin + 1; end < n && place[end] == place[begin];) ++end;
    body(begin, end);
  }
}

void add(const double* rewards, int64_t begin, int64_t end, Group& all) {
  double sum = 0, low = kInfinity, high = -kInfinity;
  bool has_nan = false;
  for (int64_t i = begin; i < end; ++i) {
    sum += rewards[i];
    low = rewards[i] < low ? rewards[i] : low;
    high = rewards[i] > high ? rewards[i] : high;
    has_nan |= std::isnan(rewards[i]);
  }
  all.sum += sum;
  all.low = std::min(all.low, low);
  all.high = std::max(all.high, high);
  all.has_nan |= has_nan;
  all.count += end - begin;
}

void add_deviations(const double* rewards, int64_t begin, int64_t end, Group& all) {
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

std::vector<Group> group(const double* rewards, const std::vector<int64_t>& place, int64_t prompts,
                         bool whole_runs) {
  std::vector<Group> groups(prompts);
  for_runs(place, [&](int64_t begin, int64_t end) {
    add(rewards, begin, end, groups[place[begin]]);
    if (whole_runs) add_deviations(rewards, begin, end, groups[place[begin]]);
  });
  if (whole_runs) return groups;
  for_runs(place, [&](int64_t begin, int64_t end) {
    add_deviations(rewards, begin, end, groups[place[begin]]);
  });
  return groups;
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

}  // namespace

RewardStats reward_stats_cpu(const double* rewards, const int64_t* prompts, const int64_t* tasks,
                             int64_t n, int64_t n_tasks, int64_t ddof) {
  RewardStats out;
  const bool whole_runs = find_prompts(prompts, n, out.prompt, out.prompt_of);
  const int64_t n_prompts = static_cast<int64_t>(out.prompt.size());
  out.task.assign(n_prompts, tasks ? -1 : 0);
  for (int64_t i = 0; tasks && i < n; ++i) {
    int64_t& task = out.task[out.prompt_of[i]];
    if (task >= 0 && task != tasks[i]) {
      out.torn = i;
      return out;
    }
    task = tasks[i];
  }

  const std::vector<Group> groups = group(rewards, out.prompt_of, n_prompts, whole_runs);
  double lowest = kInfinity, highest = -kInfinity;
  for (const Group& each : groups) {
    lowest = std::min(lowest, each.low);
    highest = std::max(highest, each.high);
  }
  for (auto* figures : {&out.mean, &out.std, &out.std_error}) figures->resize(n_prompts);
  for (auto* flags : {&out.zero_std, &out.all_best, &out.all_worst}) flags->resize(n_prompts);
  out.count.resize(n_prompts);
  std::vector<Task> of_task(n_tasks);
  for (Task& task : of_task) task.stds.reserve(n_tasks == 1 ? n_prompts : 0);
  for (int64_t p = 0; p < n_prompts; ++p) {
    const Group& each = groups[p];
    const double size = double(each.count), mean = each.mean();
    const bool zero_std = each.constant() && each.count >= 2;
    const double s = each.count > 1 ? std::sqrt(each.squares / (size - 1)) : kNaN;
    const double of_variance =
        (each.fourth / size - s * s * s * s * (size - 3) / (size - 1)) / size;
    const double shrink = ddof == 0 ? std::sqrt((size - 1) / size) : 1;
    out.count[p] = each.count;
    out.mean[p] = mean;
    out.std[p] = zero_std || (each.constant() && ddof == 0) ? 0 : s * shrink;
    // Of a NaN no maximum is taken: a comparison would lose it.
    out.std_error[p] =
        !(s > 0) ? kNaN : std::sqrt(of_variance < 0 ? 0 : of_variance) / (2 * s) * shrink;
    out.zero_std[p] = zero_std;
    out.all_best[p] = zero_std && lowest < highest && mean == highest;
    out.all_worst[p] = zero_std && lowest < highest && mean == lowest;

    Task& task = of_task[out.task[p]];
    task.rewards.sum += each.sum;
    task.rewards.low = std::min(task.rewards.low, each.low);
    task.rewards.high = std::max(task.rewards.high, each.high);
    task.rewards.has_nan |= each.has_nan;
    task.rewards.count += each.count;
    task.prompts += 1;
    task.zero_std += out.zero_std[p];
    task.all_best += out.all_best[p];
    task.all_worst += out.all_worst[p];
    if (each.count > ddof) task.stds.push_back(out.std[p]);
  }

  int64_t live = 0;
  bool any_nan = false;
  for (const Task& task : of_task) {
    live += task.prompts - task.zero_std;
    any_nan |= task.rewards.has_nan;
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

}  // namespace gradnorm
