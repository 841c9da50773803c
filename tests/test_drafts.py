"""Exports that are killed, fail or run at the same time."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anamorph.drafts import drafted
from anamorph.errors import AnamorphError

KILLED = """
import sys, time
from pathlib import Path
from anamorph.drafts import drafted
with drafted(Path(sys.argv[1])) as draft:
    (draft / "anamorph.json").write_text("{}")
    print("begun", flush=True)
    time.sleep(60)
"""


def test_a_killed_export_leaves_nothing_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(target)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert not target.exists()
    assert len(list(tmp_path.glob(".*.partial"))) == 1
    with drafted(target) as draft:
        assert draft is not None
        (draft / "file").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in target.iterdir()] == ["file"]


SECOND = """
import sys
from pathlib import Path
from anamorph.drafts import drafted
print("begun", flush=True)
with drafted(Path(sys.argv[1])) as draft:
    print("waited for" if draft is None else "wrote", flush=True)
"""


def test_of_two_exports_at_once_the_second_finds_the_first(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with drafted(target) as draft:
        assert draft is not None
        process = subprocess.Popen([sys.executable, "-c", SECOND, str(target)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.2)
        assert draft.is_dir()
    assert process.communicate()[0].strip() == "waited for"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_draft_that_fails_is_removed(tmp_path: Path) -> None:
    def fail() -> None:
        with drafted(tmp_path / "out") as draft:
            assert draft is not None
            (draft / "file").write_text("half")
            raise AnamorphError("boom")

    with pytest.raises(AnamorphError, match="boom"):
        fail()
    assert list(tmp_path.iterdir()) == []


WITHOUT_FCNTL = """
import sys, warnings
sys.modules["fcntl"] = None
warnings.simplefilter("ignore")
from pathlib import Path
from anamorph.drafts import drafted
with drafted(Path(sys.argv[1])) as draft:
    (draft / "file").write_text("written")
with drafted(Path(sys.argv[1])) as draft:
    assert draft is None
"""


def test_drafts_need_no_fcntl(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_FCNTL, str(tmp_path / "out")], check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "written"


def test_a_name_full_of_wildcards_removes_no_other_draft(tmp_path: Path) -> None:
    other = tmp_path / ".out1.77.partial"
    other.mkdir()
    with drafted(tmp_path / "out[1]") as draft:
        assert draft is not None
    assert other.is_dir()
