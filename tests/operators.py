"""The torch operators that operations run into, by the examples of their table."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gradnorm_ext import backends
from gradnorm_ext.operations import OPERATIONS

NAMESPACES = {"native": "gradnorm", "triton": "gradnorm_triton"}
DEVICES = {"native": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}  # without a GPU, the interpreter


class Calls(TorchDispatchMode):
    """Writes down every call of a library's operators: its function, and what it is given."""

    def __init__(self, namespace):
        super().__init__()
        self.namespace, self.made = namespace, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == self.namespace:
            self.made.append((function, args))
        return function(*args, **(kwargs or {}))


def served():
    """Every operation and backend that carries it out here."""
    return [(name, backend) for name in OPERATIONS for backend in NAMESPACES if serves(name, backend)]


def serves(name, backend):
    return backends.serves(name, DEVICES[backend], backend)


def calls_of(name, backend):
    """``(operator, arguments)`` of every operator that an operation's examples run into."""
    run, device = Calls(NAMESPACES[backend]), DEVICES[backend]
    with run:
        for arguments in OPERATIONS[name].examples(device):
            backends.find(name, device, backend)(**arguments)
    return run.made
