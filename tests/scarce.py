"""Places where files cannot be written: full or read-only file systems, mounted where this process may."""

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def full(place: Path, size: int) -> Iterator[None]:
    """Let `place`, an empty folder, take `size` bytes; where mounting is not allowed, each of its files."""
    if _mounted(place, f"size={size}"):
        try:
            yield
        finally:
            _run("umount", "-l", str(place))
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def sealable(place: Path) -> Iterator[Callable[[], None]]:
    """Give a function that makes `place`, an empty folder, read-only with all it holds by then."""
    mounted = _mounted(place, "size=64m")

    def seal() -> None:
        if mounted:
            assert _run("mount", "-o", "remount,ro", str(place))
        else:  # who may not mount is bound by permissions
            for folder in [place, *(path for path in place.rglob("*") if path.is_dir())]:
                folder.chmod(0o555)

    try:
        yield seal
    finally:
        if mounted:
            _run("umount", "-l", str(place))
        else:
            for folder in [place, *(path for path in place.rglob("*") if path.is_dir())]:
                folder.chmod(0o755)


def _mounted(place: Path, options: str) -> bool:
    return os.geteuid() == 0 and _run("mount", "-t", "tmpfs", "-o", options, "none", str(place))


def _run(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False
