"""Which engine was measured to be the fastest for a model on this machine; `backend="auto"` takes it.

A profile belongs to a model's architecture (its configurations and the sizes of its weight files, since speed does
not depend on the weights' values), to the processor and its cores, and to the versions of the engines: where one of
these changes, it no longer applies.
"""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from anamorph.cache import cache_folder
from anamorph.checkpoint import Checkpoint
from anamorph.files import replacing
from anamorph.machine import available_processors, package_version, processor

log = logging.getLogger(__name__)

DEFAULT = "float32"
"""The precision of a profile that serves calls which name none."""
TUNED = "tuned"
"""Takes the place of a precision where that was chosen, too."""
ENGINES = ("anamorph", "torch", "onnxruntime", "openvino")
WEIGHTS = (".safetensors", ".bin")


@dataclass(frozen=True)
class Profile:
    """The fastest engine in one precision, its seconds for a picture, and when it was measured.

    Where a `quality` was asked for, the precision is chosen, too, with `rewrites` (names with commas; "" for those
    that are on by themselves), perhaps a `folder`, the export that was measured, the `step_caching` of calls that say
    nothing of it, and `guidance_batch`, whether branches of guidance have calls of their own.
    """

    engine: str
    precision: str
    seconds: float
    measured: str
    quality: str = ""
    rewrites: str = ""
    folder: str = ""
    step_caching: int | float | None = None
    guidance_batch: str = ""

    def __str__(self) -> str:
        if not self.quality:
            asked = f"in {self.precision} when `anamorph bench best`"
        else:
            cached = "" if self.step_caching is None else f"steps cached {self.step_caching:g}"
            batch = self.guidance_batch and f"guidance {self.guidance_batch}"
            told = (self.rewrites, "int8" * bool(self.folder), cached, batch)
            further = "".join(f", {text}" for text in told if text)
            asked = f"({self.precision}{further}) at quality {self.quality} when `anamorph tune`"
        return f"{self.engine} was the fastest {asked} measured at {self.measured}"


def store(checkpoint: Checkpoint, profile: Profile) -> Path:
    """Keep a profile in the user's cache; returns its file. Raises OutputError."""
    place = _place(checkpoint, TUNED if profile.quality else profile.precision)
    with replacing(place) as draft:
        draft.write_text(json.dumps(asdict(profile), indent=2) + "\n", encoding="utf-8")
    return place


def applying(checkpoint: Checkpoint, precision: str | None) -> Profile | None:
    """The profile for calls in a precision, or in any: what was tuned for comes first, then float32's."""
    tuned = stored(checkpoint, TUNED) if precision is None else None
    if tuned is not None and tuned.folder and not Path(tuned.folder).is_dir():
        log.warning("%s was removed, so that what was tuned is not used; run `anamorph tune` again", tuned.folder)
        tuned = None
    return tuned or stored(checkpoint, precision or DEFAULT)


def stored(checkpoint: Checkpoint, precision: str) -> Profile | None:
    """The profile of a model in a precision, or the TUNED one; None where it was not measured here."""
    place = _place(checkpoint, precision)
    try:
        return Profile(**json.loads(place.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        log.warning("%s cannot be read (%s), so that it is not used; measure again or remove it", place, error)
        return None


def _place(checkpoint: Checkpoint, precision: str) -> Path:
    total = hashlib.sha256()
    index = checkpoint.folder / "model_index.json"  # which a model in a folder of its own has not
    for path in (*([index] if index.is_file() else []), *sorted(checkpoint.folder.rglob("config.json"))):
        total.update(path.relative_to(checkpoint.folder).as_posix().encode() + path.read_bytes())
    for path in sorted(path for path in checkpoint.folder.rglob("*") if path.suffix in WEIGHTS):
        total.update(f"{path.relative_to(checkpoint.folder).as_posix()} {path.stat().st_size}".encode())
    machine = [processor(), available_processors(), *map(package_version, ENGINES)]
    total.update(json.dumps([machine, checkpoint.variant, precision]).encode())
    return cache_folder() / "profiles" / f"{total.hexdigest()[:32]}.json"
