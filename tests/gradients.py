"""Statistics of examples whose gradients are given: what a block would have measured."""

import torch

from gradnorm_ext.stats import Stats

NAMES = ("math", "code")


def stats_of(units, tasks, prompts=None, reward=None, names=NAMES, gram=False):
    """Statistics of examples whose gradients are the rows of ``units``, as a block measures them."""
    tasks, units = torch.as_tensor(tasks), torch.as_tensor(units, dtype=torch.float64)
    of_task = units.new_zeros(len(names), units.shape[1]).index_add_(0, tasks, units)
    parts, task_of_prompt = [units], None
    if prompts is not None:
        prompts = torch.as_tensor(prompts)
        n = int(prompts.max()) + 1
        parts.append(units.new_zeros(n, units.shape[1]).index_add_(0, prompts, units))
        task_of_prompt = torch.zeros(n, dtype=torch.int64).scatter_(0, prompts, tasks)
    return Stats.of(
        torch.cat([part.square().sum(1) for part in (*parts, of_task)]),
        tasks=tasks,
        prompts=prompts,
        task_of_prompt=task_of_prompt,
        n_prompts=0 if prompts is None else len(task_of_prompt),
        task_names=tuple(names),
        has_tasks=True,
        reward=reward,
        task_gram=of_task @ of_task.t() if gram else None,
    )
