"""A model that PyTorch runs, as the pipeline's caller sees it."""

import warnings
from contextlib import nullcontext
from types import FunctionType
from typing import Any

from torch import nn

from anamorph.backends.offloading import offloaded
from anamorph.pipelines.loaded import SWITCHES, Loaded, Shown


class OpenedModel(nn.Module, Shown):
    """PyTorch's module with all of the model's layers and methods, and the switches of the component that it is.

    It shares the model's weights; layers, attributes and calls are the model's own, so that it can be compiled, traced
    and looked into. `to` takes a memory format alone: devices and precisions are the pipeline's.
    """

    def __new__(cls, *_: Any) -> "OpenedModel":
        """A class of its own for each: torch.compile counts what it made by code, and would add up all models."""
        plain = cls.forward
        own = FunctionType(plain.__code__.replace(), plain.__globals__, plain.__name__, None, plain.__closure__)
        return super().__new__(type(cls.__name__, (cls,), {"forward": own, "__doc__": cls.__doc__}))

    def __init__(self, model: nn.Module, loaded: Loaded) -> None:
        super().__init__()
        self._modules, self._parameters, self._buffers = model._modules, model._parameters, model._buffers
        self.training = model.training
        self.__dict__ |= {"model": model, "loaded": loaded}  # no layers of its own

    def _get_name(self) -> str:
        return type(self.model).__name__

    def forward(self, *given: Any, **named: Any) -> Any:
        """Call the model; see its `forward`. Weights that wait in host memory visit their device meanwhile."""
        waits = offloaded(self.model)
        with nullcontext() if waits is None else waits.awake():
            return self.model.forward(*given, **named)

    def to(self, *, memory_format: Any) -> "OpenedModel":  # type: ignore[override]
        """See `Loaded.to`."""
        self.loaded.to(memory_format=memory_format)
        return self

    def __getattr__(self, name: str) -> Any:
        if name in self._modules or name in self._parameters or name in self._buffers:
            return super().__getattr__(name)
        return getattr(self.loaded if name in SWITCHES else self.model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":
            warnings.warn(
                "this forward serves direct calls; pipelines go on with the model's own, so assign a module to the "
                "pipeline's attribute to have that called",
                stacklevel=2,
            )
        super().__setattr__(name, value)
