"""What the layers of a UNet are told besides x: the time, and the text that attentions look at.

Both come as they are, and each layer projects them; or as all layers' projections side by side, which were computed
before the first step, and each layer takes what lies at its `place`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from anamorph.conditions import added_names, projection
from anamorph.config import Config
from anamorph.errors import InputError
from anamorph.models.image_attention import Images


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
    first attention to the text, which deals each sample to all branches. `images` are seen beside the text.
    """

    states: Tensor | None = None
    mask: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    branches: int | None = None
    images: Images | None = None

    def dealt(self, x: Tensor, place: slice | None) -> Tensor:
        """x for every branch, where the attention at `place` is the first that looks at the text."""
        first = self.branches is not None and place is not None and place.start == 0
        return dealt(x, self.branches) if first else x


@dataclass(frozen=True)
class Joint:
    """What an adapter adds to a state, [N or 1, ...], the same for every branch; `branches` where x holds them all."""

    residual: Tensor
    branches: int | None = None

    def added(self, x: Tensor) -> Tensor:
        """x [N or branches N, ...] with the residual."""
        if self.branches is None:
            return x + self.residual
        return (torch.unflatten(x, 0, (self.branches, -1)) + self.residual).flatten(0, 1)


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
    inside: Sequence[Tensor | None] = ()
    hint: Tensor | None = None
    control_type: Tensor | None = None

    def check(self, config: Config, text: Tensor | None) -> None:
        """Raise InputError where a condition is missing, or given to a model that does not take it."""
        names = added_names(config)
        classes = config.class_embed_type is not None or config.num_class_embeds is not None
        taken = {
            "encoder_hidden_states": (text is not None, projection(config) != "image_proj"),
            "class_labels": (self.class_labels is not None, classes),
            **{f"added_cond_kwargs[{name!r}]": (True, False) for name in self.added},
            **{f"added_cond_kwargs[{name!r}]": (name in self.added, True) for name in names},
        }
        for name, (given, wanted) in taken.items():
            if wanted and not given:
                raise InputError(f"this UNet needs {name}, which is missing; pass it")
            # Where a picture takes the text's place, diffusers passes a text all the same.
            if given and not wanted and name != "encoder_hidden_states":
                raise InputError(f"this UNet takes no {name}; its configuration has no place for it, leave it out")
        if self.timestep_cond is not None and config.time_cond_proj_dim is None:
            raise InputError("this UNet takes no timestep_cond: its configuration has no time_cond_proj_dim")
        blocks = len(config.down_block_types)
        if self.inside and len(self.inside) not in (blocks, blocks + 1):
            raise InputError(
                f"down_intrablock_additional_residuals holds {len(self.inside)} tensors, expected one per block of "
                f"the way down ({blocks}), and perhaps one for the middle"
            )

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
