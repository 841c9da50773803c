"""SHA-256 of files, remembered in the user's cache as long as a file stays as it is: checkpoints have gigabytes.

A file counts as unchanged where its number, size, and times of change are the same. The time of the last change of a
file's status cannot be set by programs, so that no write goes unnoticed.
"""

import functools
import hashlib
import json
import logging
import time
from contextlib import suppress
from pathlib import Path

from anamorph.cache import cache_folder
from anamorph.errors import OutputError
from anamorph.files import replacing

log = logging.getLogger(__name__)

LARGE = 1 << 20
"""Smaller files are read faster than their record (bytes)."""
TICK_NS = 20_000_000
"""File systems may tell two changes within this time apart by nothing (nanoseconds)."""


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    return _digest(path.absolute(), *_stamp(path))


def _stamp(path: Path) -> tuple[int, ...]:
    now = path.stat()
    return now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns


@functools.lru_cache(maxsize=4096)
def _digest(path: Path, *stamp: int) -> str:
    if (size := stamp[2]) < LARGE:
        return _read(path)
    if (known := _known(path, stamp)) is not None:
        return known
    # What changes while we read must get another time than the stamp has.
    time.sleep(max(0, min(TICK_NS, stamp[4] + TICK_NS - time.time_ns())) / 1e9)
    found = _read(path)
    if _stamp(path) == stamp:
        _remember(path, stamp, found)
    else:
        log.warning("%s changed while its %d bytes were read; its digest is not remembered", path, size)
    return found


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _record(path: Path) -> Path:
    return cache_folder() / "digests" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"


def _known(path: Path, stamp: tuple[int, ...]) -> str | None:
    with suppress(OSError, ValueError, KeyError, TypeError):  # a record that cannot be read is made again
        values = json.loads(_record(path).read_text(encoding="utf-8"))
        if values["path"] == str(path) and values["stamp"] == list(stamp):
            return str(values["sha256"])
    return None


def _remember(path: Path, stamp: tuple[int, ...], found: str) -> None:
    values = {"path": str(path), "stamp": stamp, "sha256": found}
    try:
        with replacing(_record(path)) as draft:
            draft.write_text(json.dumps(values) + "\n", encoding="utf-8")
    except OutputError as error:
        log.warning("%s; the digest of %s is computed again at the next start", error, path)
