"""What a GPU's multiprocessors do in a cycle, from which tiles and methods are chosen. Nothing here was measured by us."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

# By compute capability, as NVIDIA's white papers say or as follows from their TFLOP/s, cores and clocks: multiply-adds of
# two-byte numbers with float32 sums in a cycle of one multiprocessor, and bytes that the L2 cache gives in a cycle of the chip.
_PRODUCTS = {(8, 0): 1024, (8, 6): 256, (8, 9): 256, (9, 0): 2048, (10, 0): 4096, (10, 3): 4096, (12, 0): 256}
_L2_BYTES = {(8, 0): 5120, (9, 0): 5120}
_L2_PORT = 64  # bytes a cycle that one multiprocessor can take; where no rate of the whole cache was published


@dataclass(frozen=True)
class Chip:
    """A GPU, by what it can do in a cycle.

    Attributes:
        capability: as CUDA counts: (9, 0) for an H200.
        multiprocessors: how many it has.
        products: multiply-adds of two-byte numbers a cycle of a multiprocessor.
        l2_bytes: what the L2 cache gives a multiprocessor in a cycle while all of them read.
        memory_bytes: what memory gives the chip in a cycle.
    """

    capability: tuple[int, int]
    multiprocessors: int
    products: int
    l2_bytes: float
    memory_bytes: float

    @staticmethod
    def of(capability: tuple[int, int], multiprocessors: int, clock: float, memory: float) -> "Chip":
        """From the clock of its multiprocessors, in Hz, and the rate of its memory, in bytes a second.

        Example:
            >>> Chip.of((9, 0), 132, 1.98e9, 4.8e12).products
            2048
        """
        known = [one for one in _PRODUCTS if one <= capability] or [min(_PRODUCTS)]
        l2 = _L2_BYTES.get(capability, _L2_PORT * multiprocessors) / multiprocessors
        return Chip(capability, multiprocessors, _PRODUCTS[max(known)], min(l2, _L2_PORT), memory / clock)

    @property
    def has_warpgroups(self) -> bool:
        """Whether products read shared memory (wgmma, tcgen05), of which a program may have 227 KB; else tiles are sm_80's."""
        return self.capability[0] in (9, 10)

    @property
    def is_blackwell(self) -> bool:
        """Whether sums of products are formed in tensor memory, from which a tile is loaded where it is squared."""
        return self.capability[0] == 10

    @property
    def has_grouped_product(self) -> bool:
        """Whether torch's grouped product is one kernel, and not a loop that waits for the groups' ends."""
        return self.capability[0] in (9, 10)


H200 = Chip.of((9, 0), 132, 1.98e9, 4.8e12)


def chip_of(rows: Tensor) -> Chip:
    """The chip that a tensor lies on; an H200 for the interpreter and for what is compiled without a GPU."""
    return chip(rows.device.index) if rows.is_cuda else H200


@functools.cache
def chip(index: int) -> Chip:
    """A CUDA device."""
    found = torch.cuda.get_device_properties(index)
    memory = 2 * found.memory_clock_rate * 1e3 * found.memory_bus_width / 8  # two transfers a cycle
    return Chip.of((found.major, found.minor), found.multi_processor_count, found.clock_rate * 1e3, memory)
