"""A progress bar on a terminal's error stream; nothing is drawn where nobody looks."""

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Bar:
    """A bar of `total` units; `show=None` draws it only where the error stream is a terminal."""

    def __init__(self, total: int, title: str, show: bool | None = None) -> None:
        self._total, self._title = total, title
        self._show = sys.stderr.isatty() if show is None else show
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self._show:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._progress.add_task(self._title, total=self._total)
            self._progress.start()
        return self

    def advance(self, title: str | None = None) -> None:
        """One unit is done; `title` says what comes next."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=1, description=title or self._title)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
