// The Python module. Importing it loads this library, which is what registers the operators of
// torch_ops.cpp.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/segment_std.h"

namespace py = pybind11;

namespace {

std::string describe(const py::array& array) {
  std::string shape;
  for (py::ssize_t i = 0; i < array.ndim(); ++i) {
    shape += (i ? ", " : "") + std::to_string(array.shape(i));
  }
  return py::str(array.dtype()).cast<std::string>() + " [" + shape + "]";
}

py::dict reward_stats(const py::array& rewards, const py::array& prompts, int64_t ddof) {
  if (rewards.ndim() != 1 || rewards.dtype().kind() != 'f' || rewards.dtype().itemsize() < 4 ||
      rewards.dtype().itemsize() > 8) {
    throw py::value_error("reward_stats: rewards must be a float32 or float64 array [n], got " +
                          describe(rewards) + "; convert them with astype");
  }
  if (prompts.ndim() != 1 || prompts.dtype().kind() != 'i' || prompts.size() != rewards.size()) {
    throw py::value_error("reward_stats: prompts must be an integer array [" +
                          std::to_string(rewards.size()) + "], one id per reward, got " +
                          describe(prompts) + "; pass the prompt that each reward was sampled for");
  }
  if (ddof < 0) {
    throw py::value_error("reward_stats: ddof must be at least 0, got " + std::to_string(ddof) +
                          "; pass 1 for the sample's deviation");
  }
  const auto value_array =
      py::array_t<double, py::array::c_style | py::array::forcecast>::ensure(rewards);
  const auto prompt_array =
      py::array_t<int64_t, py::array::c_style | py::array::forcecast>::ensure(prompts);
  const double* values = value_array.data();
  const int64_t* prompt = prompt_array.data();
  const int64_t n = rewards.size();

  std::vector<int64_t> distinct(prompt, prompt + n);
  std::sort(distinct.begin(), distinct.end());
  distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
  std::vector<int64_t> ids(n);
  for (int64_t i = 0; i < n; ++i) {
    ids[i] = std::lower_bound(distinct.begin(), distinct.end(), prompt[i]) - distinct.begin();
  }

  const auto groups = static_cast<int64_t>(distinct.size());
  py::array_t<double> mean(groups), std(groups), std_error(groups);
  py::array_t<int64_t> count(groups);
  py::array_t<bool> zero_std(groups);
  std::vector<double> low(groups), high(groups), fourth(groups);
  gradnorm::segment_std_cpu<double>(
      values, ids.data(), n, groups, ddof,
      {mean.mutable_data(), std.mutable_data(), count.mutable_data(), low.data(), high.data()});
  for (int64_t i = 0; i < n; ++i) fourth[ids[i]] += std::pow(values[i] - mean.at(ids[i]), 4);
  for (int64_t p = 0; p < groups; ++p) {
    const double size = double(count.at(p)), s = std.at(p);
    const double variance_of_square =
        (fourth[p] / size - std::pow(s, 4) * (size - 3) / (size - 1)) / size;
    std_error.mutable_at(p) = size < 2 || !(s > 0)
                                  ? std::numeric_limits<double>::quiet_NaN()
                                  : std::sqrt(std::max(variance_of_square, 0.0)) / (2 * s);
    zero_std.mutable_at(p) = low[p] == high[p];
  }
  py::dict stats;
  stats["prompt"] = py::array_t<int64_t>(groups, distinct.data());
  stats["mean"] = mean;
  stats["std"] = std;
  stats["std_error"] = std_error;
  stats["count"] = count;
  stats["zero_std"] = zero_std;
  return stats;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "gradnorm_ext's compiled kernels; importing it registers torch.ops.gradnorm.*";
#ifdef GRADNORM_WITH_CUDA
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
  m.attr("cuda_architectures") = GRADNORM_CUDA_ARCHITECTURES;
  m.attr("cuda_compiler") = GRADNORM_CUDA_COMPILER;
  m.attr("compiler") = GRADNORM_COMPILER;
  m.attr("torch_version") = GRADNORM_TORCH_VERSION;
  m.def("reward_stats", &reward_stats, py::arg("rewards"), py::arg("prompts"), py::arg("ddof") = 1,
        R"(Spread of the rewards of every prompt, from NumPy arrays.

    mean, std (with ddof), count    of the rewards of each prompt
    std_error = sqrt((m4 - std^4 (n - 3) / (n - 1)) / n) / (2 std)    m4: the fourth central moment

Args:
    rewards: [n], float32 or float64. A NaN makes its prompt's figures NaN.
    prompts: [n], integers of any value: the prompt of each reward.
    ddof: 1 for the sample's deviation, 0 for the population's.

Returns:
    A dict of arrays [prompts]: prompt (the distinct ids, sorted), mean, std, std_error (NaN for a
    single reward or a zero std), count, zero_std (all rewards equal).

Raises:
    ValueError: arrays of another dtype or shape.)");
}
