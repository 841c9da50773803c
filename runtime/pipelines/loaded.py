"""A component that engines have opened: what is behind `pipe.unet`, `pipe.vae` ..."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

from anamorph.components import Component
from anamorph.config import Config
from anamorph.engine import Placement, Program
from anamorph.errors import BackendError, InputError
from anamorph.memory import AttentionSlices, ChannelsLast, Offload, Saving
from anamorph.pipelines.image_prompts import Adapters
from anamorph.plugins import get_backend
from anamorph.profiles import Profile

FORMATS = {"torch.channels_last": True, "torch.contiguous_format": False}
"""Name of a memory format of PyTorch -> whether the channels of one pixel lie side by side."""
SWITCHES = ("component", "programs", "placement", "spare", "enable_slicing", "disable_slicing", "enable_tiling",
            "disable_tiling", "set_attention_slice", "enable_group_offload")  # fmt: skip
"""What a model that a pipeline shows takes from its `Loaded` rather than from itself."""


class Shown:
    """What a pipeline shows in the place of a component that it opened."""

    loaded: "Loaded"
    model: Any


@dataclass
class Sparing:
    """Which of an autoencoder's calls are divided: into single pictures, and into tiles of its training size."""

    slicing: bool = False
    tiling: bool = False


@dataclass(frozen=True)
class Loaded:
    """A component and the programs that engines made of its parts; `notes` say where that is not what was wished.

    `profile` is the measurement that decided how it runs, if one did. Pipelines that share it share its switches, and
    the IP-Adapters of a denoiser.
    """

    component: Component
    programs: dict[str, Program]
    notes: Mapping[str, str] = field(default_factory=dict)
    sparing: Sparing = field(default_factory=Sparing)
    adapters: Adapters = field(default_factory=Adapters)
    place: str | None = None
    """What the pipeline calls it, and its parts, where that is not the component's own name."""
    profile: Profile | None = None

    def placed(self, name: str) -> "Loaded":
        """The same in another place of a pipeline."""
        before = self.place or self.component.name
        if name == before:
            return self
        programs = {renamed_part(part, before, name): program for part, program in self.programs.items()}
        return replace(self, programs=programs, place=name)

    @property
    def config(self) -> Config:
        """The model's configuration."""
        return self.component.config

    @cached_property
    def shown(self) -> Any:
        """What a pipeline shows: the model, where PyTorch runs it, with these switches; else this."""
        return next(iter(self.programs.values())).shown(self)

    @property
    def placement(self) -> dict[str, Placement]:
        """Part name -> what really runs where."""
        placed = {part: program.placement for part, program in self.programs.items()}
        return {part: replace(one, part=part, details={**one.details, **self.notes}) for part, one in placed.items()}

    def enable_slicing(self) -> None:
        """Take the pictures of a batch one after another, on every engine; the results are the same."""
        self._autoencoder().slicing = True

    def disable_slicing(self) -> None:
        """Take all pictures of a batch at once."""
        self._autoencoder().slicing = False

    def enable_tiling(self) -> None:
        """Take large pictures in overlapping tiles, on every engine; seams differ a little."""
        self._autoencoder().tiling = True

    def disable_tiling(self) -> None:
        """Take pictures whole, whatever their size."""
        self._autoencoder().tiling = False

    def _autoencoder(self) -> Sparing:
        if not any(part.startswith("vae") for part in self.programs):
            raise InputError(f"{self.component.name} is no autoencoder; pictures are sliced and tiled by pipe.vae")
        return self.sparing

    def to(self, *, memory_format: Any) -> Self:
        """Lay the weights out as `torch.channels_last` or `torch.contiguous_format`; devices are the pipeline's.

        Warns where the engine chooses its layout by itself. Raises InputError: another format.
        """
        if str(memory_format) not in FORMATS:
            raise InputError(f"memory_format is {memory_format!r}, expected {' or '.join(FORMATS)}")
        noted(self.spare(ChannelsLast(FORMATS[str(memory_format)])))
        return self

    def set_attention_slice(self, slice_size: str | int | None = "auto") -> None:
        """Compute attention of some heads at a time: a number, "auto" (half of them), "max" (one), None (all).

        Warns where the engine's attention is fused. Raises InputError: another size.
        """
        noted(self.spare(AttentionSlices(slice_size)))

    def enable_group_offload(
        self,
        onload_device: Any,
        offload_device: Any = "cpu",
        offload_type: str = "block_level",
        num_blocks_per_group: int | None = None,
        non_blocking: bool = False,
        use_stream: bool = False,
        record_stream: bool = False,
        low_cpu_mem_usage: bool = False,
        offload_to_disk_path: str | None = None,
    ) -> None:
        """Let groups of layers wait in host memory and visit `onload_device` while they run; see `Offload`.

        `num_blocks_per_group` belongs to "block_level"; `low_cpu_mem_usage` locks pages piece by piece, and
        `record_stream` is part of `use_stream`, whose copies never block.
        Raises InputError: a wrong argument. Raises BackendError: the engine does not serve it, or has no such device.
        """
        wish = group(
            onload_device, offload_device, offload_type, num_blocks_per_group, non_blocking, use_stream, record_stream,
            low_cpu_mem_usage, offload_to_disk_path,
        )  # fmt: skip
        offloaded((self,), wish)

    def spare(self, saving: Saving) -> str | None:
        """Ask the programs of all parts to take memory otherwise; None, or one sentence on why one does not."""
        answers = [f"{part}: {why}" for part, one in self.programs.items() if (why := one.spare(saving)) is not None]
        return "; ".join(answers) or None


def renamed_part(part: str, before: str, after: str) -> str:
    """What a part that is called after its component's place is called in another place; others stay."""
    return after + part.removeprefix(before) if part == before or part.startswith(f"{before}_") else part


def noted(reason: str | None) -> None:
    """Warn, where there is a reason why a switch does not apply."""
    if reason is not None:
        warnings.warn(reason, stacklevel=4)


def group(
    onload: Any, offload: Any, kind: str, blocks: int | None, ahead: bool, stream: bool, record: bool, lean: bool,
    disk: str | None,
) -> Offload:  # fmt: skip
    """The arguments of diffusers' `enable_group_offload`, checked; raises InputError."""
    if str(offload) != "cpu":
        raise InputError(f"offload_device is {str(offload)!r}, expected cpu: weights wait in host memory")
    if disk is not None:
        raise InputError(
            "offload_to_disk_path is not served; weights in their stored type stay mapped from their files"
        )
    for name, given in (("record_stream", record), ("low_cpu_mem_usage", lean)):
        if given and not stream:
            raise InputError(f"{name} has no meaning without use_stream=True; leave it out")
    if kind == "block_level" and blocks is None:
        raise InputError("num_blocks_per_group is missing; offload_type block_level needs it")
    if kind not in ("block_level", "leaf_level"):
        raise InputError(f"offload_type is {kind!r}, expected block_level or leaf_level")
    return Offload(kind, str(onload), blocks or 1, stream, lean, ahead)


def offloaded(every: Sequence[Loaded], wish: Offload) -> None:
    """Let components wait in host memory, all of them or none.

    Raises BackendError: an engine does not serve it, or has no such device on this machine.
    """
    for loaded in every:
        for part, placed in loaded.placement.items():
            devices = get_backend(placed.engine).devices()
            if wish.kind is not None and wish.device not in devices:
                raise BackendError(
                    f"{part} cannot visit {wish.device!r}: engine {placed.engine} has no such device on this machine; "
                    f"it has {', '.join(devices)}"
                )
    for loaded in every:
        if (reason := loaded.spare(wish)) is not None:
            for done in every:
                done.spare(Offload(None))
            raise BackendError(reason)


def accelerators(every: Sequence[Loaded]) -> list[str]:
    """The devices that components could visit, the first of each engine first."""
    engines = {placed.engine for loaded in every for placed in loaded.placement.values()}
    return [device for name in sorted(engines) for device in get_backend(name).devices() if device.lower() != "cpu"]
