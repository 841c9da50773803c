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
ENGINES = ("anamorph", "torch", "onnxruntime", "openvino")
WEIGHTS = (".safetensors", ".bin")


@dataclass(frozen=True)
class Profile:
    """The fastest engine in one precision, its seconds for a picture, and when it was measured."""

    engine: str
    precision: str
    seconds: float
    measured: str

    def __str__(self) -> str:
        return (
            f"{self.engine} was the fastest in {self.precision} when `anamorph bench best` measured at {self.measured}"
        )


def store(checkpoint: Checkpoint, profile: Profile) -> Path:
    """Keep a profile in the user's cache; returns its file. Raises OutputError."""
    place = _place(checkpoint, profile.precision)
    with replacing(place) as draft:
        draft.write_text(json.dumps(asdict(profile), indent=2) + "\n", encoding="utf-8")
    return place


def stored(checkpoint: Checkpoint, precision: str) -> Profile | None:
    """The profile of a model in a precision; None where it was not measured here."""
    place = _place(checkpoint, precision)
    try:
        return Profile(**json.loads(place.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        log.warning("%s cannot be read (%s), so that it is not used; run `anamorph bench best` again", place, error)
        return None


def _place(checkpoint: Checkpoint, precision: str) -> Path:
    total = hashlib.sha256()
    for path in (checkpoint.folder / "model_index.json", *sorted(checkpoint.folder.rglob("config.json"))):
        total.update(path.relative_to(checkpoint.folder).as_posix().encode() + path.read_bytes())
    for path in sorted(path for path in checkpoint.folder.rglob("*") if path.suffix in WEIGHTS):
        total.update(f"{path.relative_to(checkpoint.folder).as_posix()} {path.stat().st_size}".encode())
    machine = [processor(), available_processors(), *map(package_version, ENGINES)]
    total.update(json.dumps([machine, checkpoint.variant, precision]).encode())
    return cache_folder() / "profiles" / f"{total.hexdigest()[:32]}.json"
