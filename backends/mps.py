"""PyTorch eager on Apple's graphics processors, with what is known to go wrong there (`mps_quirks`)."""

import importlib.util
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.arrays import Array
from anamorph.backends import mps_quirks as quirks
from anamorph.backends.eager import INSTALL, Eager, TorchProgram, TorchSession, load_module
from anamorph.backends.rows import BATCH, batch_axis, rows_of
from anamorph.backends.torch_arrays import TorchArrays
from anamorph.components import Component
from anamorph.engine import Backend, Placement, Program, Target
from anamorph.errors import BackendError
from anamorph.memory import AttentionSlices, Offload, Saving
from anamorph.plugins import hookimpl

DEVICE = "mps"
BRANCHES = 2
"""Rows of a denoiser's call for one picture: both branches of its guidance."""


class SingleArrays(TorchArrays):
    """Tensors of a device that knows no float64."""

    def put(self, value: NDArray[Any]) -> Any:
        return super().put(value.astype(np.float32) if value.dtype == np.float64 else value)


@dataclass(frozen=True)
class MpsProgram(TorchProgram):
    """A PyTorch model whose calls go around the quirks that are `met` here."""

    met: frozenset[str] = frozenset()
    warmed: set[str] = field(default_factory=set)
    """The part's name, once its first call is done."""

    @property
    def placement(self) -> Placement:
        """Read back from the module, with the names of the quirks that are reckoned with."""
        plain = super().placement
        return replace(plain, details={**plain.details, "quirks": " ".join(sorted(self.met))})

    @property
    def arrays(self) -> TorchArrays:
        """Tensors on the device that computes."""
        return SingleArrays(self._device) if quirks.DOUBLES in self.met else super().arrays

    def session(self) -> "MpsSession":
        """A caller that cuts batches; see `TorchProgram.session`."""
        return MpsSession(self)

    def spare(self, saving: Saving) -> str | None:
        """See `Program.spare`; all heads are computed at once before weights wait, where that is met."""
        if isinstance(saving, Offload) and saving.kind is not None and quirks.OFFLOADED in self.met:
            super().spare(AttentionSlices(None))
        return super().spare(saving)


@dataclass(frozen=True)
class MpsSession(TorchSession):
    """Calls a program with some rows at a time, and its first call twice, where that is met."""

    program: MpsProgram

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        program = self.program
        pieces = list(self._pieces(inputs))
        if quirks.WARM_UP in program.met and program.part not in program.warmed:
            super().__call__(pieces[0])
            program.warmed.add(program.part)
        results = [super(MpsSession, self).__call__(piece) for piece in pieces]
        if len(results) == 1:
            return results[0]
        axes = {port.name: batch_axis(port) or 0 for port in program.interface.outputs}
        return {name: program.arrays.concat([one[name] for one in results], axis) for name, axis in axes.items()}

    def _pieces(self, inputs: Mapping[str, Array]) -> Sequence[Mapping[str, Array]]:
        interface = self.program.interface
        rows = interface.sizes_of(inputs).get(BATCH, 1)
        most = BRANCHES if interface.outputs[0].name == "out_sample" else 1
        if quirks.BATCHES not in self.program.met or rows <= most:
            return [inputs]
        starts = range(0, rows, most)
        return [rows_of(interface, inputs, range(first, min(first + most, rows))) for first in starts]


class Mps(Eager):
    """PyTorch's device "mps"; untested on hardware, so that it is taken only when it is named."""

    name = "mps"
    rank = None
    places: Mapping[str, tuple[str, ...]] = MappingProxyType({DEVICE: ("float32", "float16", "bfloat16")})
    savings: tuple[type[Saving], ...] = (AttentionSlices, Offload)
    concurrent = False  # never tried

    def unavailable(self) -> str | None:
        if sys.platform != "darwin":
            return f"Metal is on macOS alone, and this is {platform.system()}; take the engine eager"
        return None if importlib.util.find_spec("torch") else INSTALL

    def devices(self) -> tuple[str, ...]:
        import torch

        return (DEVICE,) if torch.backends.mps.is_available() else ()

    def met(self) -> frozenset[str]:
        """Names of the quirks to reckon with on this machine."""
        return quirks.met(quirks.machine())

    def precisions(self, device: str) -> tuple[str, ...]:  # noqa: ARG002 - there is one device
        return ("float32", "float16", *(() if quirks.NARROW in self.met() else ("bfloat16",)))

    def open(self, component: Component, parts: Sequence[str], target: Target) -> dict[str, Program]:
        import torch

        here = self.met()
        if target.precision == "float16" and quirks.PICTURES in here and any(part.startswith("vae") for part in parts):
            known = quirks.QUIRKS[quirks.PICTURES]
            raise BackendError(
                f"on mps {known.problem} ({known.source}); let {component.name} be in float32: "
                f"torch_dtype={{'{component.name}': 'float32', 'default': 'float16'}}"
            )
        module = load_module(component, target)
        if quirks.LAYOUT in here:
            module.to(memory_format=torch.contiguous_format)
        if quirks.SLICES in here:
            module.set_attention_slice("auto")
        return {part: MpsProgram(**vars(self.program(component, module, part, target)), met=here) for part in parts}


@hookimpl
def anamorph_backends() -> list[Backend]:
    return [Mps()]
