"""What is asked of the exporter whose format an engine opens."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anamorph.artifact import MANIFEST, VERIFIED
from anamorph.checkpoint import Source, open_checkpoint
from anamorph.errors import AnamorphError, ArtifactError, InputError
from anamorph.exporting import ExportOptions
from anamorph.testing.subject import Check, Subject, held, open_pipeline


def _silent(_: str) -> None:
    """No progress is shown."""


def certified(subject: Subject) -> None:
    artifact = subject.opened.artifact
    if artifact is None:
        return
    statuses = {part.status for part in artifact.parts.values()} | {artifact.image.get("status")}
    held(all(str(status).startswith(VERIFIED) for status in statuses), f"its parts are {statuses}")
    held(bool(subject.certificate), "nothing was measured while it was exported")
    lost = [check.part for check in subject.certificate if not check.passed]
    held(not lost, f"{', '.join(lost)} differ from eager and were written all the same")


def verified_again(subject: Subject) -> None:
    if subject.exporter is None:
        return
    checks = subject.exporter.verify(subject.opened, subject.checkpoint, _silent, trusted=True)
    lost = [check for check in checks if not check.passed]
    held(bool(checks) and not lost, f"verifying again finds {lost}")


def refuses_folders(subject: Subject) -> None:
    exporter = subject.exporter
    if exporter is None:
        return
    folder = subject.opened.folder
    _raises(InputError, "a folder that exists", lambda: exporter.export(
        subject.checkpoint, folder, ExportOptions(), _silent))  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        again = Path(place) / "again"
        _raises(InputError, "an exported folder", lambda: exporter.export(
            subject.opened, again, ExportOptions(), _silent))  # fmt: skip
        held(not again.exists(), "an export that was refused leaves a folder behind")


def refuses_damage(subject: Subject) -> None:
    """A file that was cut or changed is found before the engine reads it."""
    if subject.opened.artifact is None:
        return
    name = max(subject.opened.artifact.parts["vae_decoder"].files.items(), key=lambda item: item[1].size)[0]
    for damage in (_cut, _changed):
        with tempfile.TemporaryDirectory() as place:
            _refuses_copy(subject, Path(place) / "copy", name, damage)


def _refuses_copy(subject: Subject, copy: Path, name: str, damage: Callable[[Path], None]) -> None:
    shutil.copytree(subject.opened.folder, copy)
    damage(copy / name)

    def open_copy() -> None:
        open_pipeline(open_checkpoint(Source(str(copy))), subject.backend.name, subject.target)

    _raises(ArtifactError, f"{name} that was damaged", open_copy)
    (copy / MANIFEST).write_text("{", encoding="utf-8")
    _raises(AnamorphError, "a manifest that was cut", open_copy)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _changed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _raises(kind: type[Exception], what: str, work: Callable[[], Any]) -> None:
    try:
        work()
    except kind:
        return
    held(False, f"{what} is taken without an error")


EXPORTER_CHECKS = (
    Check("certified", "every part and a picture were compared with eager when they were exported", certified),
    Check("verified again", "verifying what was exported finds no difference", verified_again),
    Check("refuses folders", "nothing is overwritten, and what was exported is not exported again", refuses_folders),
    Check("refuses damage", "files that were cut or changed are refused by name", refuses_damage),
)
