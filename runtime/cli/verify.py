"""`anamorph verify`: compare an exported folder with the checkpoint that it was made from."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass

from anamorph.checkpoint import Source, open_checkpoint
from anamorph.cli import DIFFERENT, OK
from anamorph.cli.export import rows, say, table
from anamorph.errors import InputError
from anamorph.exporting import PICTURE, Check
from anamorph.plugins import get_exporter

LAST = "vae_decoder"
"""The part that a picture passes last, wherever its component stands."""


@dataclass(frozen=True)
class Divergence:
    """The first comparison of each kind that is beyond its tolerance: of a part's output, a block, a step."""

    part: Check | None
    block: Check | None
    step: Check | None

    @property
    def first(self) -> Check | None:
        """What tells most of the difference; None: everything is equal within tolerance."""
        return self.part or self.step or self.block

    def __str__(self) -> str:
        if self.first is None:
            return "equal within tolerance"
        named = [f"{self.first.part}: {_figure(self.first)}"]
        if self.part is not None and self.block is not None:
            named.append(f"it begins in {_figure(self.block)}")
        if self.part is not None and self.step is not None:
            named.append(f"the picture differs from {_figure(self.step)} on")
        return f"the first to differ is {'; '.join(named)}"


def divergence(checks: Sequence[Check]) -> Divergence:
    """The first that differ, in the order in which a picture is computed."""
    failed = sorted((check for check in checks if not check.passed), key=lambda check: check.part == LAST)
    part = next((check for check in failed if check.part != PICTURE and check.block is None), None)
    blocks = (check for check in failed if check.block is not None and (part is None or check.part == part.part))
    return Divergence(part, next(blocks, None), next((check for check in failed if check.part == PICTURE), None))


def _figure(check: Check) -> str:
    return f"{check.what} (relative L2 {check.difference.relative_l2:.1e}, allowed {check.tolerance:.0e})"


def run(options: argparse.Namespace) -> int:
    """Repeat the certificate; the first part, block and step that diverge are named."""
    given = open_checkpoint(Source(options.model, variant=options.variant)) if options.model else None
    folder = open_checkpoint(Source(options.folder, local_files_only=True), None if given is None else given.folder)
    if folder.artifact is None:
        raise InputError(f"{options.folder} is no exported folder; name one that `anamorph export` wrote")
    if not folder.artifact.source["name"]:
        raise InputError(f"{options.folder} was exported by another tool, which left no certificate to repeat")
    source = given or open_checkpoint(Source(str(folder.artifact.checkpoint), variant=options.variant))
    checks = get_exporter([folder.artifact.format]).verify(
        folder, source, say, options.blocks, options.trust_remote_code
    )
    found = divergence(checks)
    if options.json:
        print(json.dumps({
            "folder": options.folder, "first_difference": _plain(found), "certificate": rows(checks),
        }, indent=2))  # fmt: skip
    else:
        print(f"{table(checks)}\n\n{options.folder}: {found}")
    return OK if found.first is None else DIFFERENT


def _plain(found: Divergence) -> dict[str, str | float | None] | None:
    first, block, step = found.first, found.block, found.step
    if first is None:
        return None
    return {
        "part": first.part,
        "what": first.what,
        "relative_l2": first.difference.relative_l2,
        "block": None if block is None else block.block,
        "block_relative_l2": None if block is None else block.difference.relative_l2,
        "step": None if step is None else step.what,
    }
