"""A cell's process, seen from its parent: started, asked, limited in memory and time, ended.

The parent blocks while it waits: one that polls would take a share of the cores that it measures.
"""

import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from anamorph.errors import BackendError, BackendUnavailable
from anamorph.machine import free_memory

SPARED = 1.0
"""GiB of the memory that is free at the start of a process that it may not take."""
GIB = 2**30
UNCOMPILED = "PYTHONDONTWRITEBYTECODE"
"""Arms start with the bytecode of their first process, as programs do."""


class Process:
    """One arm's process; every request waits for its answer.

    Raises BackendError from each method: the arm says that it failed, ended by itself, or took too long.
    """

    def __init__(self, command: Sequence[str], variables: Mapping[str, str], timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.said = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `close`
        started = time.perf_counter()
        inherited = {name: value for name, value in os.environ.items() if name != UNCOMPILED}
        try:
            self.child = subprocess.Popen(
                command, env={**inherited, **variables}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=self.said, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise BackendUnavailable(f"{command[0]} cannot be started: {error.strerror}") from None
        _limit(self.child.pid)
        self.left = b""
        try:
            self.versions: dict[str, str] = self._answer()["versions"]
        except BackendError:
            self.close()
            raise
        self.import_s = time.perf_counter() - started

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        assert self.child.stdin is not None
        try:
            self.child.stdin.write(json.dumps({"do": do, **values}).encode() + b"\n")
            self.child.stdin.flush()
        except BrokenPipeError:
            raise BackendError(self._ending()) from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._line())
        if "error" in answer:
            raise BackendError(answer["error"])
        return answer

    def _line(self) -> bytes:
        assert self.child.stdout is not None
        ends = time.monotonic() + self.timeout_s
        with selectors.DefaultSelector() as waiting:
            waiting.register(self.child.stdout, selectors.EVENT_READ)
            while b"\n" not in self.left:
                if not waiting.select(max(0.0, ends - time.monotonic())):
                    raise BackendError(f"it took more than {self.timeout_s:.3g} s")
                if not (read := os.read(self.child.stdout.fileno(), 1 << 16)):
                    raise BackendError(self._ending())
                self.left += read
        line, _, self.left = self.left.partition(b"\n")
        return line

    def _ending(self) -> str:
        code = self.child.wait()
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").strip().splitlines()
        if code == -signal.SIGKILL:
            return "the system ended it, most likely because memory ran out"
        last = lines[-1][:300] if lines else "without a word"
        reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"
        return f"it ended with {reason}: {last}"

    def close(self) -> None:
        """End the process and those that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()
        for pipe in (self.child.stdin, self.child.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        self.said.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _limit(pid: int) -> None:
    """Let a process fail before it takes the memory of all others.

    Systems without /proc or prlimit end what takes too much themselves.
    """
    if (free := free_memory()) is None:
        return
    limit = free - int(SPARED * GIB)
    with suppress(OSError, AttributeError, ValueError):
        resource.prlimit(pid, resource.RLIMIT_DATA, (limit, limit))


def run_python(module: str, *arguments: str, variables: Mapping[str, str] | None = None) -> Any:
    """What a module of ours prints as JSON in a process of its own.

    Raises BackendError: it failed.
    """
    command = [sys.executable, "-P", "-m", module, *arguments]
    done = subprocess.run(command, env={**os.environ, **(variables or {})}, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        raise BackendError(f"{module} failed: {last}")
    return json.loads(done.stdout)
