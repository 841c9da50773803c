"""Giving back memory that is not used."""

import ctypes
import gc
import mmap
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

MAPS = Path("/proc/self/maps")
INTERVAL_S = 0.2
"""Between two times of giving pages back: a processor packs half a gigabyte meanwhile (seconds)."""


@contextmanager
def giving_back(files: Sequence[Path]) -> Iterator[None]:
    """Let the system have the pages of mapped files again and again while the block reads them once, as packing does.

    They would otherwise count as this process' memory together with what is made of them.
    """
    done = threading.Event()

    def work() -> None:
        while not done.wait(INTERVAL_S):
            give_back(files)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        yield
    finally:
        done.set()
        worker.join()
        give_back(files)


def give_back(files: Sequence[Path]) -> None:
    """Let the system have the pages of mapped files, where it tells of them; they are read again when needed.

    Mappings that may be written to are left alone, as they may have been.
    """
    names = {str(file.resolve()) for file in files}
    with suppress(OSError):
        lines = MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        library = ctypes.CDLL(None)
        for place, rights, *_, name in (line.split(maxsplit=5) for line in lines if line[-1:] not in ("", " ", "]")):
            if name in names and rights.startswith("r--"):
                begin, end = (int(address, 16) for address in place.split("-"))
                library.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def release_memory() -> None:
    """Collect what refers to itself and give freed memory back to the system.

    The C library keeps freed blocks below others that are still used: after a model of 10 GB has been traced, 6 of
    them stayed with a process that no longer needed any.
    """
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)  # glibc's; other C libraries have none
