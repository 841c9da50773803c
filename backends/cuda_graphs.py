"""CUDA graphs: the kernels of a call, recorded once and started together from then on, without the host."""

import threading
from collections.abc import Callable
from typing import Any

from anamorph.engine import Target, kind_of
from anamorph.errors import BackendError

OPTION = "cuda_graphs"
"""The engine's option that asks for them."""
KIND = "cuda"
"""The kind of device that has them."""
MOST = 2
"""Shapes of a part that stay recorded: each holds memory for all values between its kernels."""
BEFORE = 2
"""Calls before the recording: compilers, libraries and allocators settle in them, which may not happen within it."""


def asked(target: Target) -> bool:
    """Whether calls on this target shall be recorded.

    Raises BackendError: the option is neither on nor off, or the device has no CUDA graphs.
    """
    wish = dict(target.options).get(OPTION, "off")
    if wish not in ("on", "off"):
        raise BackendError(f"{OPTION} is {wish!r}, expected on or off")
    if wish == "on" and kind_of(target.device) != KIND:
        raise BackendError(f"{OPTION} is on, which needs a CUDA device; this is {target.device}; leave the option away")
    return wish == "on"


class Recorded:
    """A function of tensors on one CUDA device, for the shapes of its first call, which records it.

    Inputs are copied to where the recording read its own, and outputs from where it wrote them, so that the next call
    changes none of them. Weights are read where they lay then. Safe to call from several threads.
    Source: CUDA C++ Programming Guide, "CUDA Graphs", stream capture.
    """

    def __init__(self, function: Callable[..., tuple[Any, ...]], origin: str) -> None:
        self.function, self.origin = function, origin
        self.lock = threading.Lock()
        self.graph: Any = None
        self.inputs: list[Any] = []
        self.outputs: tuple[Any, ...] = ()

    def __call__(self, *values: Any) -> tuple[Any, ...]:
        """Record if need be, and replay; None stands for what was left out."""
        with self.lock:
            if self.graph is None:
                self._record(values)
            for place, value in zip(self.inputs, values, strict=True):
                if place is not None:
                    place.copy_(value)
            self.graph.replay()
            return tuple(output.clone() for output in self.outputs)

    def _record(self, values: tuple[Any, ...]) -> None:
        import torch

        inputs = [None if value is None else value.clone() for value in values]
        device = next(value.device for value in inputs if value is not None)
        with torch.cuda.device(device):  # streams and recordings are those of the device that is the current one
            now, apart = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
            apart.wait_stream(now)
            with torch.cuda.stream(apart):
                for _ in range(BEFORE):
                    self.function(*inputs)
            now.wait_stream(apart)
            graph = torch.cuda.CUDAGraph()
            # Other threads may take memory meanwhile, which recordings of the whole process would forbid them.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                outputs = self.function(*inputs)
        self.inputs, self.outputs, self.graph = inputs, outputs, graph
