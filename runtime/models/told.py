"""What the layers of a UNet are told besides x: the time, and the text that attentions look at.

Both come as they are, and each layer projects them; or as all layers' projections side by side, which were computed
before the first step, and each layer takes what lies at its `place`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from anamorph.errors import InputError


@dataclass(frozen=True)
class Times:
    """The time projections of all residual blocks at one step, [1 or B, sum of channels]."""

    row: Tensor


Time = Tensor | Times
"""The time embedding [1 or B, time_width], or what the residual blocks make of it."""


@dataclass(frozen=True)
class Text:
    """The states [B, S, D] that attentions look at, or all attentions' keys and values of them, [B, S, sum of widths].

    `mask` [B, 1, 1, S] is added to the scores. With `branches`, B is that many times the number of samples until the
    first attention to the text, which deals each sample to all branches.
    """

    states: Tensor | None = None
    mask: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    branches: int | None = None

    def dealt(self, x: Tensor, place: slice | None) -> Tensor:
        """x for every branch, where the attention at `place` is the first that looks at the text."""
        first = self.branches is not None and place is not None and place.start == 0
        return dealt(x, self.branches) if first else x


def dealt(x: Tensor, branches: int | None) -> Tensor:
    """Every sample once for each branch, branch by branch: [N, ...] -> [branches N, ...]."""
    return x if branches is None else x[None].expand(branches, *[-1] * x.ndim).flatten(0, 1)


@dataclass(frozen=True)
class Conditions:
    """What a call of a denoiser knows besides x_t, t and the text; the names are those of its `forward`."""

    timestep_cond: Tensor | None = None
    class_labels: Tensor | None = None
    added: Mapping[str, Tensor] = field(default_factory=dict)
    down: Sequence[Tensor | None] = ()
    mid: Tensor | None = None
    inside: Sequence[Tensor] = ()

    def joined(self, states: Sequence[Tensor]) -> list[Tensor]:
        """The states of the way down with a ControlNet's residuals; raises InputError: too many or too few."""
        if not self.down:
            return list(states)
        if len(states) != len(self.down):
            raise InputError(f"down_block_additional_residuals holds {len(self.down)} tensors, expected {len(states)}")
        pairs = zip(states, self.down, strict=True)
        return [state if residual is None else state + residual for state, residual in pairs]


def mask_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """0 for tokens to look at and -10000 for the others, as attention adds it to its scores: [B, S] -> [B, 1, 1, S]."""
    return None if mask is None else ((1 - mask.to(dtype)) * -10000.0)[:, None, None, :]


class Placed(Protocol):
    """A layer whose projection is `width` wide, and lies at `place` among those of its kind."""

    width: int
    place: slice | None


def give_places(layers: Iterable[Placed]) -> None:
    """Let the projections of these layers lie side by side, in order."""
    end = 0
    for layer in layers:
        layer.place = slice(end, end + layer.width)
        end += layer.width
