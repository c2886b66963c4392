from typing import Any

import numpy as np
import numpy.typing as npt

with_cuda: bool
with_cutlass: bool
cuda_architectures: str
cuda_compiler: str
compiler: str
cpu_product: str  # the fused product that runs here: its instructions, or "none"
cpu_products: tuple[str, ...]  # those of this processor, the fastest first
cpu_product_always: bool  # whether it is faster than torch's, whatever the rows
torch_version: str

def cuda_problem() -> str: ...
def outer_parts(d: int, p: int, kernel: int) -> int: ...
def reward_stats(
    rewards: npt.NDArray[np.floating[Any]],
    prompts: npt.NDArray[np.integer[Any]],
    tasks: npt.NDArray[np.integer[Any]] | None = None,
    n_tasks: int | None = None,
    ddof: int = 1,
) -> dict[str, Any]: ...
