// reward_stats_cpu against figures worked out by hand; tests/test_rewards.py has the rest.
#include "check.h"
#include "kernels/reward_stats.h"

namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

template <typename T>
void same(const std::string& what, const std::vector<T>& got, const std::vector<T>& expected) {
  const bool ok = got == expected;
  std::printf("%s: %s\n", ok ? "ok" : "FAIL", what.c_str());
  check::failures += !ok;
}

// Four prompts: spread, equal and best, alone, equal and worst. However their ids come, the figures
// are the same: ascending, in a table's reach, and far apart.
void test(const std::string& what, const std::vector<int64_t>& ids,
          const std::vector<int64_t>& order) {
  const std::vector<double> rewards = {0, 2, 0.5, 2, 2, 1, 0, 0};
  const std::vector<int64_t> members = {0, 0, 0, 1, 1, 2, 3, 3}, of_task = {0, 0, 2, 2};
  std::vector<double> given;
  std::vector<int64_t> prompts, tasks, places;
  for (const int64_t i : order) {
    given.push_back(rewards[i]);
    prompts.push_back(ids[members[i]]);
    tasks.push_back(of_task[members[i]]);
    places.push_back(members[i]);
  }
  const auto stats =
      gradnorm::reward_stats_cpu(given.data(), prompts.data(), tasks.data(), 8, 3, 1);
  const double std = std::sqrt(13.0 / 12), mean = 2.5 / 3;
  const double fourth = (std::pow(mean, 4) + std::pow(2 - mean, 4) + std::pow(0.5 - mean, 4)) / 3;
  same<int64_t>(what + ": refused", {stats.refused}, {-1});
  same(what + ": prompt", stats.prompt, ids);
  same(what + ": prompt_of", {stats.prompt_of.get(), stats.prompt_of.get() + 8}, places);
  same(what + ": task", stats.task, of_task);
  same<int64_t>(what + ": count", stats.count, {3, 2, 1, 2});
  check::close<double>(what + ": mean", stats.mean, {mean, 2, 1, 0}, 4);
  check::close<double>(what + ": std", stats.std, {std, 0, kNaN, 0}, 4);
  check::close<double>(what + ": std_error", stats.std_error,
                       {std::sqrt(fourth / 3) / (2 * std), kNaN, kNaN, kNaN}, 8);
  same<uint8_t>(what + ": zero_std", stats.zero_std, {0, 1, 0, 1});
  same<uint8_t>(what + ": all_best", stats.all_best, {0, 1, 0, 0});
  same<uint8_t>(what + ": all_worst", stats.all_worst, {0, 0, 0, 1});
  check::close<double>(what + ": task_mean", stats.task_mean, {6.5 / 5, kNaN, 1.0 / 3}, 4);
  check::close<double>(what + ": task_std_mean", stats.task_std_mean, {std / 2, kNaN, 0}, 4);
  check::close<double>(what + ": task_std_p10", stats.task_std_p10, {0.1 * std, kNaN, 0}, 4);
  check::close<double>(what + ": zero share", stats.task_zero_std_share, {0.5, kNaN, 0.5}, 0);
  check::close<double>(what + ": best share", stats.task_all_best_share, {0.5, kNaN, 0}, 0);
  check::close<double>(what + ": worst share", stats.task_all_worst_share, {0, kNaN, 0.5}, 0);
  check::close<double>(what + ": share", stats.task_share, {0.5, 0, 0.5}, 0);
  check::close<double>(what + ": realised", stats.task_realised_share, {0.5, 0, 0.5}, 0);
}

}  // namespace

int main() {
  const std::vector<int64_t> near = {-3, 4, 5, 9};
  const std::vector<int64_t> far = {std::numeric_limits<int64_t>::min(), -1, 7,
                                    std::numeric_limits<int64_t>::max()};
  for (const auto& ids : {near, far}) {
    const std::string which = ids == near ? "near ids" : "far ids";
    test(which + ", ascending", ids, {0, 1, 2, 3, 4, 5, 6, 7});
    test(which + ", in runs", ids, {6, 7, 0, 1, 2, 5, 3, 4});
    test(which + ", mixed", ids, {3, 0, 6, 5, 1, 4, 2, 7});
  }
  const double rewards[] = {1, kNaN, 0, 0};
  const int64_t prompts[] = {0, 0, 1, 1};
  const auto spoiled = gradnorm::reward_stats_cpu(rewards, prompts, nullptr, 4, 1, 0);
  check::close<double>("a NaN: mean", spoiled.mean, {kNaN, 0}, 0);
  check::close<double>("a NaN: std", spoiled.std, {kNaN, 0}, 0);
  check::close<double>("a NaN: realised share", spoiled.task_realised_share, {kNaN}, 0);
  same<uint8_t>("a NaN: zero_std", spoiled.zero_std, {0, 1});

  const auto refused = [&](const std::vector<int64_t>& of, std::vector<int64_t> tasks,
                           int64_t n_tasks) {
    return gradnorm::reward_stats_cpu(rewards, of.data(), tasks.data(), 4, n_tasks, 1).refused;
  };
  for (const std::vector<int64_t>& of : {std::vector<int64_t>{0, 0, 1, 1}, {1, 1, 0, 0}}) {
    const std::string order = of[0] == 0 ? "ascending" : "mixed";
    same<int64_t>(order + ": two tasks", {refused(of, {0, 1, 0, 0}, 2)}, {1});
    same<int64_t>(order + ": too large", {refused(of, {0, 0, 2, 2}, 2)}, {2});
    same<int64_t>(order + ": negative", {refused(of, {0, 0, 0, -1}, 0)}, {3});
    same<int64_t>(order + ": as many as there are", {refused(of, {0, 0, 2, 2}, 0)}, {-1});
  }
  return check::failures != 0;
}
