"""What the cache keeps between starts: digests of large files, and entries that engines wrote."""

import hashlib
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from scarce import full, sealable

from anamorph import digests
from anamorph.digests import LARGE, digest
from anamorph.entries import ENTRY, Key, find, keep, nearest, nothing_kept
from anamorph.errors import OutputError

KEY = Key("unet", "engine 1.2", "a" * 64, "b" * 64, "any", "float32", "threads=2", "a processor 0a1b")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANAMORPH_CACHE", str(tmp_path / "cache"))
    digests._digest.cache_clear()


def write(draft: Path) -> None:
    (draft / "code").write_bytes(b"native")


def large(place: Path, first: int = 0) -> Path:
    place.write_bytes(bytes([first]) + bytes(LARGE))
    return place


def next_process() -> None:
    """What a process has in mind is gone when it ends."""
    digests._digest.cache_clear()


def test_a_large_file_is_read_once_for_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = large(tmp_path / "weights")
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest(path) == expected
    next_process()
    monkeypatch.setattr(digests, "_read", lambda path: pytest.fail(f"{path} is read again"))
    assert digest(path) == expected


@pytest.mark.parametrize("keep_time", [False, True])
def test_a_changed_file_has_another_digest(tmp_path: Path, keep_time: bool) -> None:
    """Also where the size is the same, and somebody sets the time of the change back."""
    path = large(tmp_path / "weights")
    before, about = digest(path), path.stat()
    with path.open("r+b") as file:
        file.write(b"\1")
    if keep_time:
        os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    next_process()
    assert digest(path) == hashlib.sha256(path.read_bytes()).hexdigest() != before


def test_a_file_in_another_place_of_the_same_name_has_its_own_digest(tmp_path: Path) -> None:
    path = large(tmp_path / "weights")
    before = digest(path)
    large(tmp_path / "other", 1).replace(path)
    next_process()
    assert digest(path) != before


def test_damaged_records_of_digests_are_made_again(tmp_path: Path) -> None:
    path = large(tmp_path / "weights")
    expected = digest(path)
    (record,) = (tmp_path / "cache" / "digests").iterdir()
    for damage in ("", "{}", "[]", json.dumps({"path": str(path), "stamp": [0], "sha256": "0"})):
        record.write_text(damage)
        next_process()
        assert digest(path) == expected
        assert json.loads(record.read_text())["sha256"] == expected


def test_a_read_only_cache_costs_the_record_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").mkdir()
    path = large(tmp_path / "weights")
    with sealable(tmp_path / "cache") as seal:
        seal()
        assert digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "computed again at the next start" in caplog.text


def test_an_entry_is_found_by_its_whole_key_alone() -> None:
    assert find(KEY) is None
    kept = keep(KEY, write)
    assert kept is not None
    found = find(KEY)
    assert found is not None
    assert (found.folder / "code").read_bytes() == b"native"
    assert found.size == 6
    for name in vars(KEY):
        assert find(replace(KEY, **{name: "another"})) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda place: (place / "code").write_bytes(b"wicked"),
        lambda place: (place / "code").write_bytes(b"nat"),
        lambda place: (place / "code").unlink(),
        lambda place: (place / ENTRY).unlink(),
        lambda place: (place / ENTRY).write_text("{"),
        lambda place: (place / ENTRY).write_text((place / ENTRY).read_text().replace("float32", "bfloat16")),
        lambda place: (place / ENTRY).write_text((place / ENTRY).read_text().replace('"code"', '"../code"')),
        lambda place: place.chmod(0o777),
    ],
)
def test_a_damaged_entry_is_named_removed_and_made_again(damage: object, caplog: pytest.LogCaptureFixture) -> None:
    assert keep(KEY, write) is not None
    damage(KEY.folder)  # type: ignore[operator]
    assert find(KEY) is None
    assert "removed from the cache and made again" in caplog.text
    assert str(KEY.folder) in caplog.text
    assert not KEY.folder.exists()
    assert keep(KEY, write) is not None
    assert find(KEY) is not None


def test_of_two_writers_the_first_counts() -> None:
    def second(draft: Path) -> None:
        raise AssertionError(f"{draft} is written although the entry is there")

    assert keep(KEY, write) is not None
    kept = keep(KEY, second)
    assert kept is not None
    assert (kept.folder / "code").read_bytes() == b"native"


def test_concurrent_writers_leave_one_whole_entry(tmp_path: Path) -> None:
    children = []
    for _ in range(4):
        if not (child := os.fork()):
            os._exit(0 if keep(KEY, write) is not None else 1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert find(KEY) is not None
    assert [path.name for path in (tmp_path / "cache" / "compiled").iterdir()] == [KEY.folder.name]


def test_a_killed_writer_leaves_no_entry_and_no_draft(tmp_path: Path) -> None:
    def killed(draft: Path) -> None:
        (draft / "code").write_bytes(b"nat")
        os.kill(os.getpid(), signal.SIGKILL)

    if not (child := os.fork()):
        keep(KEY, killed)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert find(KEY) is None
    assert keep(KEY, write) is not None
    assert [path.name for path in (tmp_path / "cache" / "compiled").iterdir()] == [KEY.folder.name]


def test_a_full_disk_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").mkdir()
    with full(tmp_path / "cache", 1 << 16):
        assert keep(KEY, lambda draft: (draft / "code").write_bytes(bytes(1 << 20)) and None) is None
        assert "going on without the cache" in caplog.text
        assert find(KEY) is None


def test_what_an_engine_cannot_write_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    def failing(draft: Path) -> None:
        raise OutputError(f"cannot write {draft}")

    assert keep(KEY, failing) is None
    assert "going on without the cache" in caplog.text


def test_nothing_is_kept_where_that_is_wished() -> None:
    with nothing_kept():
        assert keep(KEY, write) is None
    assert find(KEY) is None
    assert keep(KEY, write) is not None


def test_the_nearest_entry_tells_what_differs() -> None:
    far = replace(KEY, engine="engine 1.1", processor="another")
    near = replace(KEY, engine="engine 1.1")
    for key in (far, near, replace(KEY, part="vae_decoder")):
        assert keep(key, write) is not None
    found = nearest(KEY)
    assert found is not None
    assert KEY.differences(found.key) == {"engine": ("engine 1.2", "engine 1.1")}
