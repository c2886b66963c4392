// The Python module. Importing it loads this library, which is what registers the operators of
// torch_ops.cpp.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#ifdef GRADNORM_WITH_CUDA
#include "kernels/cuda/driver.h"
#include "kernels/outer_wgrad.h"
#endif
#include "kernels/cpu/fused_product.h"
#include "kernels/reward_stats.h"

namespace py = pybind11;

namespace {

std::string describe(const py::array& array) {
  std::string shape;
  for (py::ssize_t i = 0; i < array.ndim(); ++i) {
    shape += (i ? ", " : "") + std::to_string(array.shape(i));
  }
  return py::str(array.dtype()).cast<std::string>() + " [" + shape + "]";
}

// An array that owns the vector's memory; `Shown` is the element type that Python sees.
template <typename Shown, typename T>
py::array as_array(std::vector<T>&& values) {
  static_assert(sizeof(Shown) == sizeof(T));
  auto* kept = new std::vector<T>(std::move(values));
  py::capsule owner(kept, [](void* vector) { delete static_cast<std::vector<T>*>(vector); });
  return py::array_t<Shown>(static_cast<py::ssize_t>(kept->size()),
                            reinterpret_cast<const Shown*>(kept->data()), owner);
}

void check_ids(const char* name, const py::array& ids, const py::array& rewards) {
  if (ids.ndim() != 1 || ids.dtype().kind() != 'i' || ids.size() != rewards.size()) {
    throw py::value_error(std::string("reward_stats: ") + name + " must be an integer array [" +
                          std::to_string(rewards.size()) + "], one id per reward, got " +
                          describe(ids) + "; pass whose each reward is");
  }
}

template <typename Real>
py::dict as_dict(gradnorm::RewardStats<Real>&& found, int64_t n) {
  py::dict stats;
  stats["refused"] = found.refused;
  if (found.refused >= 0) return stats;
  stats["prompt"] = as_array<int64_t>(std::move(found.prompt));
  stats["task"] = as_array<int64_t>(std::move(found.task));
  stats["count"] = as_array<int64_t>(std::move(found.count));
  int64_t* prompt_of = found.prompt_of.release();
  stats["prompt_of"] = py::array_t<int64_t>(
      n, prompt_of, py::capsule(prompt_of, [](void* ids) { delete[] static_cast<int64_t*>(ids); }));
  stats["zero_std"] = as_array<bool>(std::move(found.zero_std));
  stats["all_best"] = as_array<bool>(std::move(found.all_best));
  stats["all_worst"] = as_array<bool>(std::move(found.all_worst));
  stats["mean"] = as_array<Real>(std::move(found.mean));
  stats["std"] = as_array<Real>(std::move(found.std));
  stats["std_error"] = as_array<Real>(std::move(found.std_error));
  stats["task_mean"] = as_array<Real>(std::move(found.task_mean));
  stats["task_std_mean"] = as_array<Real>(std::move(found.task_std_mean));
  stats["task_std_p10"] = as_array<Real>(std::move(found.task_std_p10));
  stats["task_zero_std_share"] = as_array<Real>(std::move(found.task_zero_std_share));
  stats["task_all_best_share"] = as_array<Real>(std::move(found.task_all_best_share));
  stats["task_all_worst_share"] = as_array<Real>(std::move(found.task_all_worst_share));
  stats["task_share"] = as_array<Real>(std::move(found.task_share));
  stats["task_realised_share"] = as_array<Real>(std::move(found.task_realised_share));
  return stats;
}

py::dict reward_stats(const py::array& rewards, const py::array& prompts,
                      const std::optional<py::array>& tasks, std::optional<int64_t> n_tasks,
                      int64_t ddof) {
  if (rewards.ndim() != 1 || rewards.dtype().kind() != 'f' || rewards.dtype().itemsize() < 4 ||
      rewards.dtype().itemsize() > 8) {
    throw py::value_error("reward_stats: rewards must be a float32 or float64 array [n], got " +
                          describe(rewards) + "; convert them with astype");
  }
  check_ids("prompts", prompts, rewards);
  if (tasks) check_ids("tasks", *tasks, rewards);
  if (ddof != 0 && ddof != 1) {
    throw py::value_error("reward_stats: ddof must be 0 or 1, got " + std::to_string(ddof) +
                          "; pass 1 for the sample's deviation");
  }
  if (n_tasks && *n_tasks < 1) {
    throw py::value_error("reward_stats: n_tasks must be at least 1, got " +
                          std::to_string(*n_tasks) + "; pass the number of tasks");
  }
  constexpr int kContiguous = py::array::c_style | py::array::forcecast;
  const auto prompt = py::array_t<int64_t, kContiguous>::ensure(prompts);
  py::array_t<int64_t, kContiguous> task;
  if (tasks) task = py::array_t<int64_t, kContiguous>::ensure(*tasks);
  const auto stats_of = [&](const auto& values) {
    const int64_t n = values.size(), known_tasks = n_tasks.value_or(tasks ? 0 : 1);
    return as_dict(gradnorm::reward_stats_cpu(values.data(), prompt.data(),
                                              tasks ? task.data() : nullptr, n, known_tasks, ddof),
                   n);
  };
  return rewards.dtype().itemsize() == 4
             ? stats_of(py::array_t<float, kContiguous>::ensure(rewards))
             : stats_of(py::array_t<double, kContiguous>::ensure(rewards));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "gradnorm_ext's compiled kernels; importing it registers torch.ops.gradnorm.*";
#ifdef GRADNORM_WITH_CUDA
  m.attr("with_cuda") = true;
  m.def("cuda_problem", &gradnorm::cuda_problem,
        "Why the CUDA kernels cannot run here; empty if they can.");
  m.def(
      "outer_parts",
      [](int64_t d, int64_t p, int64_t kernel) {
        return gradnorm::outer_parts(static_cast<gradnorm::OuterKernel>(kernel), d, p);
      },
      py::arg("d"), py::arg("p"), py::arg("kernel"),
      "In how many parts a fused kernel (OuterKernel) for a [d, p] weight writes every norm.");
#else
  m.attr("with_cuda") = false;
  m.def(
      "cuda_problem", [] { return "built without CUDA"; },
      "Why the CUDA kernels cannot run here; empty if they can.");
#endif
#ifdef GRADNORM_WITH_CUTLASS
  m.attr("with_cutlass") = true;
#else
  m.attr("with_cutlass") = false;
#endif
  m.attr("cuda_architectures") = GRADNORM_CUDA_ARCHITECTURES;
  m.attr("cuda_compiler") = GRADNORM_CUDA_COMPILER;
  m.attr("compiler") = GRADNORM_COMPILER;
  const gradnorm::FusedKernel* product = gradnorm::fused_kernel();
  m.attr("cpu_product") = product ? product->instructions : "none";
  m.attr("cpu_product_always") = product && product->always;
  py::list products;
  for (const auto& kernel : gradnorm::fused_kernels()) products.append(kernel.instructions);
  m.attr("cpu_products") = py::tuple(products);
  m.attr("torch_version") = GRADNORM_TORCH_VERSION;
  m.def("reward_stats", &reward_stats, py::arg("rewards"), py::arg("prompts"),
        py::arg("tasks") = py::none(), py::arg("n_tasks") = py::none(), py::arg("ddof") = 1,
        R"(The figures of gradnorm_ext.RewardStats, from NumPy arrays, formed in float64.

Args:
    rewards: [n], float32 or float64. A NaN makes its prompt's figures NaN, and its task's.
    prompts: [n], integers of any value: the prompt of each reward.
    tasks: [n], integers in [0, n_tasks), or None: one task.
    n_tasks: how many tasks there are; None: the largest one, plus 1.
    ddof: 1 for the sample's deviation, 0 for the population's.

Returns:
    A dict of arrays: RewardStats' figures by name, in the rewards' dtype, and under "refused" -1; or
    "refused" alone, an example whose task is out of range, or not that of its prompt's others.

Raises:
    ValueError: arrays of another dtype or shape.)");
}
