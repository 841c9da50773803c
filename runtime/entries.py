"""What engines made of graphs for this machine, kept in the user's cache so that the next start takes seconds.

An entry is a folder below `compiled/` with the files that an engine wrote and `entry.json`: the key, and the SHA-256 of
each file. It appears whole or not at all. Entries may hold native code: they are taken from a folder of this user only.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anamorph.artifact import FileRecord, inside
from anamorph.cache import CACHE, cache_folder
from anamorph.drafts import drafted
from anamorph.errors import ArtifactError, OutputError
from anamorph.machine import processor

log = logging.getLogger(__name__)

ENTRY = "entry.json"
_keeping = ContextVar("keeping", default=True)
ANY = "any"
"""The shape of an entry that serves all sizes."""


@dataclass(frozen=True)
class Key:
    """What a compiled artefact depends on; it is taken only where all of it is the same.

    `graph` and `weights` are SHA-256, `shape` names the size of each open axis or is "any", `settings` are what else
    the engine was told, `engine` its name with its version.
    """

    part: str
    engine: str
    graph: str
    weights: str
    shape: str
    precision: str
    settings: str
    processor: str

    @classmethod
    def of(
        cls,
        part: str,
        engine: str,
        graph: Mapping[str, FileRecord],
        weights: Mapping[str, FileRecord],
        shape: str,
        precision: str,
        settings: Mapping[str, Any],
    ) -> "Key":
        """The key for files with these records, on this machine."""
        told = ", ".join(f"{name}={value}" for name, value in sorted(settings.items()))
        return cls(part, engine, _joint(graph), _joint(weights), shape, precision, told, processor())

    @property
    def folder(self) -> Path:
        """Where its entry lies, if there is one."""
        total = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return cache_folder() / "compiled" / f"{self.engine.split()[0]}-{self.part}-{total[:24]}"

    def differences(self, other: "Key") -> dict[str, tuple[str, str]]:
        """Component -> its value here and there, where they differ."""
        mine, others = asdict(self), asdict(other)
        return {name: (value, others[name]) for name, value in mine.items() if value != others[name]}


def _joint(files: Mapping[str, FileRecord]) -> str:
    """One SHA-256 for several files."""
    rows = (f"{name} {record.sha256}" for name, record in sorted(files.items()))
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


@dataclass(frozen=True)
class Entry:
    """An artefact in the cache: its folder and files, and when it was made and last used (seconds since 1970)."""

    folder: Path
    key: Key
    files: Mapping[str, FileRecord]
    made: float
    used: float

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(record.size for record in self.files.values())


def find(key: Key) -> Entry | None:
    """The entry for a key with all of its files as they were written; None, and it is removed, where one is not."""
    try:
        entry = read(key.folder)
        if entry is None:
            return None
        if entry.key != key:
            raise ArtifactError(f"{entry.folder} is the entry of another key")
        for name, record in entry.files.items():
            if FileRecord.of(entry.folder / name) != record:
                raise ArtifactError(f"{entry.folder / name} is not the file that was written (SHA-256)")
    except (ArtifactError, OSError) as error:
        discard(key.folder, str(error))
        return None
    with suppress(OSError):  # a cache may be read-only
        os.utime(entry.folder / ENTRY)
    return entry


def read(folder: Path) -> Entry | None:
    """What an entry says about itself, or None where there is none.

    Raises ArtifactError: it is damaged, or others than this user may have written it.
    """
    path = folder / ENTRY
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        about = path.stat()
        check_owner(folder)
        files = {str(name): FileRecord(**record) for name, record in values["files"].items()}
        if not all(inside(name) for name in files):
            raise ArtifactError(f"{path} names files outside its folder")
        return Entry(folder, Key(**values["key"]), files, float(values["made"]), about.st_mtime)
    except FileNotFoundError:
        if folder.exists():
            raise ArtifactError(f"{folder} has no {ENTRY}") from None
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} cannot be read ({error})") from None


def check_owner(folder: Path) -> None:
    """Raise ArtifactError where others than this user may have written a folder, which native code is loaded from."""
    if not hasattr(os, "getuid"):  # Windows keeps user folders apart by itself
        return
    about = folder.stat()
    if about.st_uid != os.getuid() or about.st_mode & 0o002:
        raise ArtifactError(f"{folder} is not this user's own, and may hold foreign code")


@contextmanager
def nothing_kept() -> Iterator[None]:
    """Add no entries meanwhile: what is compiled to be compared once is not worth the disk that it takes."""
    token = _keeping.set(False)
    try:
        yield
    finally:
        _keeping.reset(token)


def keep(key: Key, write: Callable[[Path], None]) -> Entry | None:
    """Let `write` fill a folder and make it the key's entry; None, with a warning, where the disk does not take it.

    Where another process has made the entry meanwhile, that one is taken.
    """
    if not _keeping.get():
        return None
    try:
        with drafted(key.folder) as draft:
            if draft is not None:
                write(draft)
                files = {path.name: asdict(FileRecord.of(path)) for path in sorted(draft.iterdir())}
                values = {"key": asdict(key), "files": files, "made": time.time()}
                (draft / ENTRY).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    except OutputError as error:
        log.warning("%s; going on without the cache (the variable %s names another one)", error, CACHE)
        return None
    return find(key)


def discard(folder: Path, reason: str) -> None:
    """Say that an entry does not serve and remove it, so that it is made again."""
    log.warning("%s; it is removed from the cache and made again", reason)
    shutil.rmtree(folder, ignore_errors=True)


def every() -> Iterator[Entry]:
    """All entries that can be read."""
    for folder in sorted((cache_folder() / "compiled").glob("[!.]*")):
        try:
            entry = read(folder)
        except ArtifactError:
            continue
        if entry is not None:
            yield entry


def nearest(key: Key) -> Entry | None:
    """Of the entries of the same part, the one that differs in the fewest components."""
    same = [entry for entry in every() if entry.key.part == key.part]
    return min(same, key=lambda entry: len(key.differences(entry.key)), default=None)
