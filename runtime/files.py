"""Writing files so that a crash leaves nothing half-done."""

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anamorph.errors import OutputError


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a temporary name beside `target`; moved onto it when the block ends well, removed otherwise.

    Raises OutputError: the disk is full or read-only, or the folder cannot be made.
    """
    draft: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent)
        os.close(handle)
        draft = Path(name)
        yield draft
        draft.chmod(0o666 & ~_umask())
        draft.replace(target)
    except OSError as error:
        raise OutputError(
            f"cannot write {target}: {error.strerror or error}; free the disk or name another place"
        ) from None
    finally:
        if draft is not None:
            draft.unlink(missing_ok=True)


_asking = threading.Lock()


def _umask() -> int:
    with _asking:  # which sets it for all threads
        mask = os.umask(0)
        os.umask(mask)
    return mask
