"""What the runtime knows of exporters: their contract, and how a checkpoint becomes an artifact in the user's cache."""

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from anamorph.artifact import MANIFEST, NATIVE, PORTABLE, Difference
from anamorph.cache import CACHE, cache_folder
from anamorph.checkpoint import Checkpoint, Source, open_checkpoint
from anamorph.digests import digest
from anamorph.errors import ArtifactError, CheckpointError, InputError, OutputError
from anamorph.rewrites import NONE, SPLIT_EINSUM, Wish, wanted

log = logging.getLogger(__name__)

PICTURE = "picture"
"""What certificates call the comparison of a whole picture, beside the names of parts."""
STORAGE = ("float32", "float16", "bfloat16")
LINKED = "linked"
"""Storage of weights that stay in the checkpoint."""


INT8 = "int8"
"""Storage of a part whose layers multiply whole numbers of eight bits, but for those that it harms most."""


@dataclass(frozen=True)
class Quantization:
    """How a denoiser becomes int8: from what it sees in `samples` calls while it draws `prompts` in so many `steps`.

    Layers are left in float32, the most harmful first, until a call differs by at most `error` (relative L2).
    Raises InputError: there are no prompts, or a number is not positive.
    """

    prompts: tuple[str, ...]
    steps: int = 20
    samples: int = 48
    error: float = 0.05

    def __post_init__(self) -> None:
        if not self.prompts:
            raise InputError("calibration has no prompts; give a file with one on each line")
        if min(self.steps, self.samples) < 1 or self.error <= 0:
            raise InputError(
                f"calibration has {self.steps} steps, {self.samples} samples and an error of {self.error}; "
                "each must be positive"
            )


ATTENTIONS = {"original": (), "split_einsum": (SPLIT_EINSUM,)}
"""How Core ML's denoisers compute attention, by Apple's names -> the rewrites that this takes."""
PALETTES = (1, 2, 3, 4, 6, 8)
"""Bits of an index into a table of weights that Core ML knows."""


def palette(bits: int) -> str:
    """What the storage of weights is called that are indices of so many bits into a table."""
    return f"palette{bits}"


@dataclass(frozen=True)
class CoreMl:
    """What Core ML's packages shall hold beyond what every artifact does.

    `attention` is "split_einsum", for the Neural Engine, or "original"; weights are indices of `palette` bits into a
    table for each layer (None: float16); `sizes` are further ones, as functions that share weights (macOS 15, iOS 18);
    `chunked` cuts the denoiser into two packages. With the name of a `version`, files and types of inputs are those
    that apple/ml-stable-diffusion looks for, which loses fractions of timesteps.
    Raises InputError: a value is none of these.
    """

    attention: str = "split_einsum"
    palette: int | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    chunked: bool = False
    version: str | None = None

    def __post_init__(self) -> None:
        if self.attention not in ATTENTIONS:
            raise InputError(f"attention is {self.attention!r}, expected {' or '.join(ATTENTIONS)}")
        if self.palette is not None and self.palette not in PALETTES:
            known = ", ".join(map(str, PALETTES))
            raise InputError(f"weights cannot be indices of {self.palette} bits; expected one of {known}")
        if self.version is not None and self.sizes:
            raise InputError("apple/ml-stable-diffusion opens packages of one size; leave out the version or the sizes")


@dataclass(frozen=True)
class ExportOptions:
    """What an artifact shall hold.

    `storage`: type of the weights on disk, or "linked" to leave them in the checkpoint (pickles are copied); None
    takes the format's own, which is float32 where it may be.
    `size`: the only height and width (pixels), `batch`: the only number of pictures of a call; None leaves them open.
    `signature`: "portable" takes the inputs that other tools feed, "native" also our optional ones.
    `rewrites` (native signature) are those to compute by; None takes those that are on for the format by themselves.
    `quantize` brings the denoiser to int8; `coreml` is for that format alone.
    Raises InputError: a value is none of these, or linked weights or rewrites are wanted in a portable folder.
    """

    storage: str | None = None
    size: tuple[int, int] | None = None
    batch: int | None = None
    signature: str = PORTABLE
    rewrites: Wish = None
    quantize: Quantization | None = None
    coreml: CoreMl | None = None

    def __post_init__(self) -> None:
        if self.storage not in (*STORAGE, LINKED, None):
            raise InputError(f"weights cannot be stored as {self.storage!r}; expected one of {', '.join(STORAGE)}")
        if self.signature not in (PORTABLE, NATIVE):
            raise InputError(f"signature is {self.signature!r}, expected {PORTABLE} or {NATIVE}")
        if self.storage == LINKED and self.signature == PORTABLE:
            raise InputError("a portable folder holds its own weights; linked ones need the native signature")
        if self.signature == PORTABLE and self.rewrites not in (None, NONE):
            raise InputError("a portable folder computes as other tools expect; rewrites need the native signature")
        if self.batch is not None and self.batch < 1:
            raise InputError(f"batch is {self.batch}, expected 1 or more")

    def wanted(self, form: str) -> tuple[str, ...]:
        """Names of the rewrites that are meant for a format; raises InputError: one is unknown."""
        if self.coreml is not None:
            return ATTENTIONS[self.coreml.attention]
        return () if self.signature == PORTABLE else wanted(self.rewrites, form)


@dataclass(frozen=True)
class Check:
    """One line of a certificate: what was compared, the largest difference, and whether it is within tolerance.

    `block` is the path of a block of the model, where its output was compared and not the part's.
    """

    part: str
    what: str
    difference: Difference
    tolerance: float
    block: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the relative L2 difference is within tolerance; NaN is not."""
        return self.difference.relative_l2 <= self.tolerance


Report = Callable[[str], None]


@runtime_checkable
class Exporter(Protocol):
    """Writes checkpoints in one format; an object of this shape is what a plug-in hands over."""

    @property
    def format(self) -> str:
        """What it writes, such as "onnx"; engines name it among what they open."""

    @property
    def storages(self) -> tuple[str, ...]:
        """Types in which it stores weights, out of `STORAGE` and "linked"; exports in the cache have the first."""

    def unavailable(self) -> str | None:
        """None, or one sentence: what is missing and how to install it. Must be cheap and import nothing heavy."""

    def fingerprint(self) -> Mapping[str, str]:
        """Versions of the packages that decide what is written."""

    def export(self, checkpoint: Checkpoint, folder: Path, options: ExportOptions, report: Report) -> Sequence[Check]:
        """Write an artifact into `folder`, which must not exist, and certify it; returns what was measured.

        Raises ArtifactError: it differs from eager by more than the tolerance (nothing is left behind).
        Raises OutputError: it cannot be written.
        """

    def verify(
        self, artifact: Checkpoint, source: Checkpoint, report: Report, blocks: bool = False, trusted: bool = False
    ) -> Sequence[Check]:
        """Compare an artifact with the checkpoint that it was made from: parts, a picture step by step, and last,
        in the order in which they are computed, the blocks of the parts that differ, or of all where `blocks`.
        Machine code in it runs only where it is `trusted`, or in the cache of this user.

        Raises ArtifactError: it was made from another checkpoint.
        """


def export_place(checkpoint: Checkpoint, exporter: Exporter, options: ExportOptions) -> Path:
    """Where the checkpoint's artifact lies in the cache, if it is there."""
    decided = {**exporter.fingerprint(), "rewrites": " ".join(options.wanted(exporter.format))}
    versions = "".join(f"{key}={value};" for key, value in sorted(decided.items()))
    content = _content(checkpoint)
    name = f"{content[:32]}-{exporter.format}-{options.storage}-{hashlib.sha256(versions.encode()).hexdigest()[:12]}"
    return cache_folder() / "exports" / name


def cached_options(exporter: Exporter, rewrites: Wish = None) -> ExportOptions:
    """What its exports in the cache are."""
    return ExportOptions(storage=exporter.storages[0], signature=NATIVE, rewrites=rewrites)


def cached_export(checkpoint: Checkpoint, exporter: Exporter, rewrites: Wish = None) -> Checkpoint:
    """The checkpoint's artifact in the cache, exported now if it is not there or damaged; says in the log which.

    Raises what `Exporter.export` raises.
    """
    options = cached_options(exporter, rewrites)
    place = export_place(checkpoint, exporter, options)
    if place.is_dir() and (found := _opened(place, checkpoint)) is not None:
        log.info("%s: taking the %s export in %s", checkpoint.folder, exporter.format, place)
        return found
    log.info("%s: exporting to %s once, into %s", checkpoint.folder, exporter.format, place)
    _export_into_cache(checkpoint, exporter, place, options)
    return open_checkpoint(Source(str(place)), made_from=checkpoint.folder)


def _opened(place: Path, checkpoint: Checkpoint) -> Checkpoint | None:
    """An export of the cache, or None where it is damaged; then it is removed."""
    try:
        found = open_checkpoint(Source(str(place)), made_from=checkpoint.folder)
        assert found.artifact is not None
        for part in found.artifact.parts:
            found.artifact.open_part(part)
    except (ArtifactError, CheckpointError) as error:
        log.warning("%s; it is removed from the cache and made again", error)
        shutil.rmtree(place, ignore_errors=True)
        return None
    with suppress(OSError):  # a cache may be read-only
        os.utime(place / MANIFEST)
    return found


def _export_into_cache(checkpoint: Checkpoint, exporter: Exporter, place: Path, options: ExportOptions) -> None:
    try:
        exporter.export(checkpoint, place, options, log.info)
    except InputError:
        if not place.is_dir():  # else another process has finished it since
            raise
    except OutputError as error:
        raise OutputError(f"{error}; the variable {CACHE} names another cache") from None


def _content(checkpoint: Checkpoint) -> str:
    """SHA-256 over everything that decides what an export holds: weights, configurations, vocabulary, variant."""
    total = hashlib.sha256(str(checkpoint.variant).encode())
    for path in sorted(checkpoint.folder.rglob("*")):
        if path.suffix in (".json", ".txt", ".safetensors", ".bin") and path.is_file():
            total.update(path.relative_to(checkpoint.folder).as_posix().encode() + bytes.fromhex(digest(path)))
    return total.hexdigest()
