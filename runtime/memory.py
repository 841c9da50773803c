"""What a program can be asked for after it was opened, so that it takes less memory; engines answer or say why not."""

from dataclasses import dataclass

from anamorph.errors import InputError

JOINT, APART = "joint", "apart"
"""Branches of guidance in one call of a denoiser, or each in a call of its own."""
KINDS = ("model", "sequential", "block_level", "leaf_level")


@dataclass(frozen=True)
class AttentionSlices:
    """Attention of `size` heads of one picture at a time: "auto" takes half of them, "max" one, None all at once."""

    size: int | str | None

    def refusal(self, engine: str) -> str:
        """Why an engine that runs finished graphs does not serve it."""
        return f"attention slicing does not apply: {engine} fuses attention and never holds all of its scores"


@dataclass(frozen=True)
class ChannelsLast:
    """Weights of convolutions with the channels of one pixel side by side, or (`on=False`) with its own plane each."""

    on: bool

    def refusal(self, engine: str) -> str:
        """Why an engine that runs finished graphs does not serve it."""
        return f"memory_format does not apply: {engine} chooses the layout of its weights by itself"


@dataclass(frozen=True)
class Offload:
    """Weights that wait in host memory and visit `device` while they are needed; `kind` None: they stay where they are.

    `kind` is "model" (the whole component, until the next one is called), "block_level" (`blocks` neighbours of a list
    of blocks at a time), "leaf_level" or "sequential" (layer by layer). With `stream`, the next weights are copied
    while the last ones compute, from page-locked memory, which is taken piece by piece where it shall be `lean`. With
    `ahead`, the host does not wait for a copy's end; streams never do.

    Raises InputError: the kind is unknown, or the number of blocks is not positive.
    """

    kind: str | None
    device: str = "cpu"
    blocks: int = 1
    stream: bool = False
    lean: bool = False
    ahead: bool = False

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise InputError(f"offload_type is {self.kind!r}, expected block_level or leaf_level")
        if not isinstance(self.blocks, int) or self.blocks < 1:
            raise InputError(f"num_blocks_per_group is {self.blocks!r}, expected 1 or more")

    def refusal(self, engine: str) -> str:
        """Why an engine that runs finished graphs does not serve it."""
        return f"offloading does not apply: {engine} keeps weights where it computes; open the part with eager"


@dataclass(frozen=True)
class OwnSizes:
    """At most `most` sizes have a compiled model of their own, which is faster; one model serves all others.

    Raises InputError: the number is negative.
    """

    most: int

    def __post_init__(self) -> None:
        if not isinstance(self.most, int) or self.most < 0:
            raise InputError(f"most is {self.most!r}, expected 0 or more sizes with a compiled model of their own")

    def refusal(self, engine: str) -> str:
        """Why an engine does not serve it."""
        return f"sizes with a model of their own do not apply: {engine} has one for all sizes, or shares its weights"


Saving = AttentionSlices | ChannelsLast | Offload | OwnSizes
