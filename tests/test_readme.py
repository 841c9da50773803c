"""Every example of the README runs as it stands."""

import re
import shlex
from pathlib import Path

import pytest

from anamorph.cli import OK, main

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_examples_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code, names)
    if "picture" in names:
        assert tuple(names["picture"].shape) == (1, 3, 64, 64)  # type: ignore[attr-defined]
    else:
        assert names["image"].size == names["green"].size == (64, 64)  # type: ignore[attr-defined]
        assert (tmp_path / "halfway.png").is_file()


def test_command_line_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(lines) >= 4
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "anamorph"
        assert main(arguments) == OK
    written = {path.name for path in tmp_path.iterdir()}
    assert {"apple.png", "apple-replay.png", "more-1.png", "more-2.png"} <= written
