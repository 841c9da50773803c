"""What distinguishes one format from another, for the exporter that all of them share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from anamorph.errors import InputError
from anamorph.exporters.trace import with_scalars
from anamorph.exporting import ExportOptions
from anamorph.interface import Interface
from anamorph.pipelines.slots import Tokenizer

if TYPE_CHECKING:
    import torch

    from anamorph.exporters.storing import Storing, Written


def open_sizes(options: ExportOptions) -> ExportOptions:
    """Options of formats whose graphs take any size; raises InputError: some are for another format."""
    if options.coreml is not None:
        raise InputError("attention, palettes, chunks and several sizes are options of coreml; leave them out")
    return replace(options, storage=options.storage or "float32")


@dataclass(frozen=True)
class Writing:
    """One part to be written into `folder`: its interface, and what traces its model for an interface.

    A `wide` one overflows in float16.
    """

    interface: Interface
    trace: Callable[[Interface], "torch.export.ExportedProgram"]
    folder: Path
    storing: "Storing"
    options: ExportOptions
    wide: bool = False


def for_all_sizes(
    write: Callable[["torch.export.ExportedProgram", Interface, Path, "Storing"], "Written"],
    scalars: tuple[int, ...] = (),
) -> Callable[[Writing], "Written"]:
    """A writer of one graph for all sizes; `scalars` are the dimensions that its files give to single numbers."""

    def run(writing: Writing) -> "Written":
        program = writing.trace(writing.interface)
        return write(program, with_scalars(writing.interface, scalars), writing.folder, writing.storing)

    return run


@dataclass(frozen=True)
class Format:
    """What distinguishes one format: `write` writes one part.

    `packages` decide what is written, `storages` are the types in which it stores weights, `root_files(storage)`
    further files; `write_tokenizer(tokenizer, folder)` adds a form of the tokenizer that its readers want, or returns
    why it cannot. `native` formats hold machine code for this processor, `static` ones take the sizes alone that they
    were written for; UNets of those that know no `images` have no inputs for pictures as prompts, whose attention is an
    operation of our own. `settle` fills in options that are left to the format, and refuses those that it does not
    serve.
    """

    name: str
    packages: tuple[str, ...]
    write: Callable[[Writing], "Written"]
    unavailable: Callable[[], str | None]
    storages: tuple[str, ...] = ("float32",)
    root_files: Callable[[str], Mapping[str, str]] = lambda _: {}
    write_tokenizer: Callable[[Tokenizer, Path], str | None] = lambda *_: None
    native: bool = False
    static: bool = False
    images: bool = True
    settle: Callable[[ExportOptions], ExportOptions] = open_sizes
