"""Making a folder appear complete or not at all, whatever happens meanwhile and whoever else tries."""

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from anamorph.errors import OutputError


@contextmanager
def drafted(target: Path) -> Iterator[Path | None]:
    """Give a hidden folder beside `target`, renamed to it when the block ends well and removed otherwise.

    One process at a time: who comes second waits, and gets None where the first has finished `target`. Drafts that
    killed processes left behind are removed first.
    Raises OutputError: the disk is full or read-only.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / f".{target.name}.lock"):
            if target.exists():
                yield None
                return
            for stale in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
                shutil.rmtree(stale, ignore_errors=True)
            draft = target.parent / f".{target.name}.{os.getpid()}.partial"
            draft.mkdir()
            try:
                yield draft
                draft.rename(target)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise OutputError(
            f"cannot write {target}: {error.strerror or error}{where}; free the disk or name another place"
        ) from None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that the system lets go when the process ends, however it ends."""
    with FileLock(path):
        try:
            yield
        finally:
            # A process that waits for this very file notices that it has gone, and takes a new one. On systems that
            # keep open files from being removed, the library does it.
            with suppress(PermissionError):
                path.unlink(missing_ok=True)
