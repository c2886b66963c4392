// The spread of the rewards of every prompt's examples, and what it says about each task.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace gradnorm {

// Per prompt (in ascending order of the ids), per example, and per task; what each figure means is
// written in gradnorm_ext/rewards.py. All are formed in double.
template <typename Real>
struct RewardStats {
  std::vector<int64_t> prompt, task, count;
  std::vector<Real> mean, std, std_error;
  std::vector<uint8_t> zero_std, all_best, all_worst;  // 0 or 1
  std::unique_ptr<int64_t[]> prompt_of;                // per example
  std::vector<Real> task_mean, task_std_mean, task_std_p10, task_zero_std_share,
      task_all_best_share, task_all_worst_share, task_share, task_realised_share;
  // An example whose task is not in [0, n_tasks), or not that of its prompt's other examples: then
  // there are no figures. Else -1.
  int64_t refused = -1;
};

// rewards, prompts  [n]; tasks  [n], or null for one task; n_tasks  0 for the largest task, plus 1;
// ddof  0 or 1
template <typename Real>
RewardStats<Real> reward_stats_cpu(const Real* rewards, const int64_t* prompts,
                                   const int64_t* tasks, int64_t n, int64_t n_tasks, int64_t ddof);

}  // namespace gradnorm
