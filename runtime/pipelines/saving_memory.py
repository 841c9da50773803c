"""Memory that an autoencoder need not take on any engine, and what other libraries' switches mean here."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from anamorph.arrays import Array
from anamorph.engine import Placement, Program
from anamorph.errors import BackendError
from anamorph.tiling import Operations, Tiles, sparing


@dataclass(frozen=True)
class Sparing:
    """Which of an autoencoder's calls are divided: into single pictures, and into tiles of its training size."""

    slicing: bool = False
    tiling: bool = False


def divided(program: Program, name: str, values: Array, cut: Tiles, wish: Sparing) -> Array:
    """The program's only output for its only input `name` [B, C, h, w], computed in pieces as the wish says."""
    session = program.session()
    (output,) = (port.name for port in program.interface.outputs)

    def call(part: Array) -> Array:
        return session({name: part})[output]

    operations = Operations(lambda parts, axis: program.arrays.concat(list(parts), axis), program.arrays.put)
    return sparing(call, values, cut, operations, slicing=wish.slicing, tiling=wish.tiling)


def attention_slicing_applies_nowhere() -> None:
    """Say why attention is not sliced: no engine here holds all scores of a head at once."""
    warnings.warn(
        "attention slicing does not apply: attention is fused on every engine, which never holds all of its scores",
        stacklevel=3,
    )


def refuse_offload(what: str, placement: Mapping[str, Placement]) -> None:
    """Say that everything is on the processor already; raises BackendError where something is not."""
    elsewhere = [part for part, placed in placement.items() if not placed.device.lower().startswith("cpu")]
    if elsewhere:
        raise BackendError(
            f"{what} is not served by this version, and {', '.join(elsewhere)} run on an accelerator; keep components "
            'on the processor with device={"default": "cpu", "unet": "cuda"} when opening the pipeline'
        )
    warnings.warn(f"{what} does not apply: everything runs on the processor already", stacklevel=3)
