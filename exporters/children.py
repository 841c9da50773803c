"""Processes of their own for the steps of an export that must not share its memory or its state."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from anamorph.errors import AnamorphError, ArtifactError


def run_child(failure: str, module: str, *arguments: str | Path) -> str:
    """Run a module of the exporters with these arguments; returns what it printed.

    Raises ArtifactError: it failed; `failure` begins the sentence and what it said last ends it.
    """
    # -P: a stranger's file in the working folder must not take the place of a module.
    command = [sys.executable, "-P", "-m", f"anamorph.exporters.{module}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
        raise ArtifactError(f"{failure}: {last}")
    return done.stdout


def answered(work: Callable[[], None]) -> int:
    """The exit code of such a process: foreseen failures of its work are one sentence on the error stream."""
    try:
        work()
    except (AnamorphError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0
