"""What a command's pictures follow: ControlNets and T2I-Adapters, and the picture of each."""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anamorph.checkpoint import ALONE, Checkpoint, Source, open_checkpoint
from anamorph.cli.sources import file_record, read_picture
from anamorph.errors import InputError
from anamorph.pipelines import DiffusionPipeline
from anamorph.pipelines.auto import with_nets
from anamorph.pipelines.controlnet_union import United
from anamorph.pipelines.followed import Followed

FOLLOWED = tuple(kind for kind, place in ALONE.items() if place != "image_encoder")
"""Classes of nets that follow pictures."""

CONTROL = re.compile(r"(?:(?P<net>[\w.-]+)=)?(?P<file>.+?)(?::(?P<scale>\d+(?:\.\d+)?))?")
"""[NET=]FILE[:SCALE]"""


@dataclass(frozen=True)
class Nets:
    """Nets that a command names, by what it calls them."""

    opened: Mapping[str, Checkpoint]
    kind: str | None = None
    """Their class, which is one for all."""

    @property
    def components(self) -> dict[str, Any]:
        """As `from_pretrained` takes them."""
        folders = [str(checkpoint.folder) for checkpoint in self.opened.values()]
        return {} if self.kind is None else {ALONE[self.kind]: folders}

    def pipeline(self, kind: type[DiffusionPipeline], class_name: str) -> type[DiffusionPipeline]:
        """The class that follows them, in the place of `kind`, or of the checkpoint's own class."""
        if self.kind is None:
            return kind
        name = class_name if kind is DiffusionPipeline else kind.__name__
        return DiffusionPipeline.registry[with_nets(name, self.kind)]

    def record(self) -> dict[str, dict[str, str]]:
        """Folder and SHA-256 of the weights of each."""
        return {name: {"name": str(one.folder), "sha256": one.digest()} for name, one in self.opened.items()}


def nets_of(options: argparse.Namespace, recorded: Mapping[str, Any] | None = None) -> Nets:
    """The nets of `--controlnet [NET=]FOLDER`, or those that a picture records.

    Raises InputError: two have one name, kinds are mixed, or one is another than was recorded.
    """
    recorded = recorded or {}
    wishes = options.controlnet or [f"{name}={entry.get('name')}" for name, entry in recorded.items()]
    opened: dict[str, Checkpoint] = {}
    for wish in wishes:
        name, apart, folder = wish.rpartition("=")
        name = name if apart else Path(folder).name
        if name in opened:
            raise InputError(f"--controlnet names {name} twice; give each a name of its own, as in NET=FOLDER")
        opened[name] = open_checkpoint(Source(folder))
        if opened[name].class_name not in FOLLOWED:
            known = ", ".join(FOLLOWED)
            raise InputError(f"--controlnet {folder} is a {opened[name].class_name}, expected one of {known}")
    if recorded and {name: one.digest() for name, one in opened.items()} != {
        name: entry.get("sha256") for name, entry in recorded.items()
    }:
        raise InputError(f"the picture was made along other nets: {', '.join(recorded)}; name them with --controlnet")
    kinds = {one.class_name for one in opened.values()}
    if len(kinds) > 1:
        raise InputError(
            f"--controlnet names nets of several kinds ({', '.join(sorted(kinds))}); take one kind at a time"
        )
    return Nets(opened, next(iter(kinds), None))


def controls_of(
    pipe: DiffusionPipeline, nets: Nets, options: argparse.Namespace
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """The pictures of `--control [NET=]FILE[:SCALE]` as arguments of a call, and what is recorded of them.

    Raises InputError: one is missing, or is for no net.
    """
    if not isinstance(pipe, Followed):
        if options.control:
            raise InputError(f"--control is for nets, but {type(pipe).__name__} has none; name one with --controlnet")
        return {}, []
    parsed, modes = _followed(pipe, list(nets.opened) or pipe.nets, options.control or ())
    names = list(parsed)
    files = [Path(parsed[name][0]) for name in names]
    pictures = [read_picture(file, "control") for file in files]
    scale = f"{pipe.PLACE}_conditioning_scale"
    given: dict[str, Any] = {**modes, pipe.FOLLOWS: pictures if len(names) > 1 else pictures[0]}
    wished = [parsed[name][1] for name in names]
    if any(one is not None for one in wished):  # else the default counts, or what a picture records
        given[scale] = [pipe.TAKES.default(scale) if one is None else one for one in wished]
    return given, [{"net": name, **file_record(file)} for name, file in zip(names, files, strict=True)]


Parsed = dict[str, tuple[str, float | None]]
"""What a wish names -> file and scale."""


def _followed(pipe: Followed, nets: Sequence[str], wishes: Sequence[str]) -> tuple[Parsed, dict[str, Any]]:
    """The wishes in the order of the nets, and the kinds of their pictures where nets know several.

    Such a net is named with a kind, as NET.KIND, a net alone as KIND; it may follow several pictures.
    """
    if not isinstance(pipe, United):
        parsed = _parsed(wishes, nets)
        if missing := [name for name in nets if name not in parsed]:
            raise InputError(f"the picture for {missing[0]} is missing; give it with --control {missing[0]}=FILE")
        return {name: parsed[name] for name in nets}, {}
    several = len(nets) > 1
    every = {f"{net}.{kind}" if several else str(kind): (net, kind)
             for net, kinds in zip(nets, pipe.kinds, strict=True) for kind in range(kinds)}  # fmt: skip
    found = _parsed(wishes, list(every))
    for net in nets:
        own = [name for name in found if every[name][0] == net]
        if not own or (several and len(own) > 1):
            example = f"{net}.0" if several else "0"
            raise InputError(f"{net} has {len(own)} pictures; give one for a kind, as in --control {example}=FILE")
    ordered = sorted(found, key=lambda name: nets.index(every[name][0]))
    return {name: found[name] for name in ordered}, {"control_mode": [every[name][1] for name in ordered]}


def _parsed(wishes: Sequence[str], names: Sequence[str]) -> Parsed:
    found: Parsed = {}
    for wish in wishes:
        match = CONTROL.fullmatch(wish)
        assert match is not None
        net, file, scale = match["net"], match["file"], match["scale"]
        if net is None and len(names) > 1:
            raise InputError(f"--control {wish} says not which of {', '.join(names)} it is for; write NET=FILE")
        name = names[0] if net is None else net
        if name not in names:
            raise InputError(f"--control {wish} is for {name}, but the nets are {', '.join(names)}")
        if name in found:
            raise InputError(f"--control names two pictures for {name}; give one")
        found[name] = file, None if scale is None else float(scale)
    return found


def check_same(recorded: Sequence[Mapping[str, str]], found: Sequence[Mapping[str, str]], picture: Path) -> None:
    """Raise InputError where pictures to follow are others than those that were recorded."""
    for before, now in zip(recorded, found, strict=False):
        if before.get("sha256") != now.get("sha256"):
            raise InputError(f"{picture} followed {before.get('file')}, and {now.get('file')} is another file")
    if len(recorded) != len(found):
        raise InputError(f"{picture} followed {len(recorded)} pictures, but {len(found)} are given with --control")
