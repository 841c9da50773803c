"""How the weights of an exported graph are stored: in its own file and type, or left in the checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from anamorph.errors import BackendError
from anamorph.linked import LINKABLE, Constant, Linked
from anamorph.weights import Entry

INLINE = 1024
"""Constants up to this size are not worth a link (bytes)."""
NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
}  # fmt: skip
"""Types of weights, and what checkpoints call them."""


@dataclass(frozen=True)
class Origin:
    """A tensor of the checkpoint: its name there, and where it lies if that can be mapped (`file` is relative)."""

    tensor: str
    file: str | None = None
    entry: Entry | None = None


@dataclass(frozen=True)
class Storing:
    """How weights are stored: in `dtype` beside the graph, or left in the checkpoint where `linked`.

    `origins` are the checkpoint's tensors by the names that the model gives them.
    """

    dtype: str = "float32"
    linked: bool = False
    origins: Mapping[str, Origin] = field(default_factory=dict)

    def link(self, weight: "Weight") -> Entry | None:
        """Where the weight lies in the checkpoint, if the graph shall refer to it there."""
        origin = self.origins.get(weight.name)
        if not self.linked or origin is None or weight.value.nbytes <= INLINE:
            return None
        return origin.entry if origin.entry is not None and origin.entry.dtype in LINKABLE else None

    def values(self, weight: "Weight") -> Linked:
        """The values of a weight that is not linked, in the type of the file."""
        value = weight.stored(self.dtype)
        bits = value.view(torch.int16) if value.dtype == torch.bfloat16 else value  # which NumPy does not have
        return Linked(bits.numpy(), NAMES[value.dtype])


@dataclass(frozen=True)
class Weight:
    """A tensor of the model as the graph uses it; matrices of linear layers are stored transposed."""

    name: str
    value: torch.Tensor
    transposed: bool = False

    def stored(self, dtype: str) -> torch.Tensor:
        """The values in the order and type of the file; raises BackendError where the type cannot hold them."""
        value = self.value.detach()
        value = (value.t() if self.transposed else value).contiguous()
        if not value.is_floating_point():
            return value
        narrow = value.to(getattr(torch, dtype))
        if narrow.dtype != value.dtype and not narrow.isfinite().all():
            raise BackendError(f"weight {self.name} has values beyond {dtype}'s range; export with dtype fp32")
        return narrow


@dataclass(frozen=True)
class Written:
    """What was written: the `file` to open, block -> value that it ends with, constant -> where it comes from.

    `roots` are the folders that belong to the part where its own does not, `storage` the type of the weights on disk
    where it is not the one that was asked for.
    """

    file: str
    taps: Mapping[str, str]
    constants: Mapping[str, Constant]
    roots: tuple[Path, ...] = ()
    storage: str | None = None
