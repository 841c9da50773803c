"""Running a documentation's snippets: what is read, what is changed, what lies in the cache, and what is counted."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image

from anamorph.benchmarks.snippets import __main__ as command
from anamorph.benchmarks.snippets import cache, reading, rules, running
from anamorph.benchmarks.snippets.reading import Block
from anamorph.benchmarks.snippets.report import Result, report
from anamorph.errors import InputError

TEXT = """# A library

### First steps
https://example.org/docs/main/first.md

```bash
git clone https://huggingface.co/someone/model
```

```py
>>> from diffusers import Thing

>>> for i in range(2):
...     print(i)

...     # a comment
0
1
>>> Thing {
  ...,
}
```

  ```Python
  x = "cuda"
  if x:
      y = torch.float16
  ```

> ```python
> z = 1
> ```

### Others
https://example.org/docs/main/deep/down/other.md

```diff
- pipe.to("cuda")
+ pipe.enable()
  pipe()
```

```
printed
```
"""


def blocks() -> list[Block]:
    return [block for name, text in reading.chapters(TEXT).items() for block in reading.blocks(name, text)]


def test_blocks_are_what_a_person_types() -> None:
    found = blocks()
    assert [(block.name, block.language) for block in found] == [
        ("first[1]", "bash"), ("first[2]", "py"), ("first[3]", "python"), ("first[4]", "python"), ("other[1]", "diff"),
        ("other[2]", ""),
    ]  # fmt: skip
    assert found[1].code == (
        "from diffusers import Thing\n\nfor i in range(2):\n    print(i)\n\n    # a comment\nThing {"
    )
    assert found[2].code == 'x = "cuda"\nif x:\n    y = torch.float16'
    assert found[3].code == "z = 1"
    assert rules.clones(found[:4]) == {"model": "someone/model"}
    with pytest.raises(InputError, match="no page was found"):
        reading.chapters("# nothing\n")


def test_rules_say_what_they_change() -> None:
    found = blocks()
    code, used = rules.adapted(found[1], "anamorph")
    assert code.splitlines()[0] == "from anamorph import Thing"
    assert [rule.name for rule in used] == ["library"]
    assert rules.adapted(found[1], "diffusers") == (found[1].code, [])
    code, used = rules.adapted(found[2], "diffusers")
    assert code == 'x = "cpu"\nif x:\n    y = torch.float32'
    assert [rule.name for rule in used] == ["processor", "float32"]
    assert rules.adapted(found[2], "anamorph", "cuda") == (found[2].code, [])
    assert rules.adapted(found[4], "diffusers")[0] == "pipe.enable()\n  pipe()"
    own = Block("sdxl_turbo", 1, "py", "pipe.unet = torch.compile(pipe.unet)")
    assert rules.adapted(own, "diffusers")[0] == ("pipeline_text2image.unet = torch.compile(pipeline_text2image.unet)")
    printed = "pipe.scheduler.compatibles\n[\n    diffusers.schedulers.a.B,\n    diffusers.schedulers.c.D,\n]"
    assert rules.adapted(Block("stable_diffusion", 1, "py", printed), "diffusers")[0] == "pipe.scheduler.compatibles\n"
    assert all(rule.why for rule in rules.RULES)
    named = {chapter for rule in (*rules.RULES, *rules.LEFT_OUT) for chapter in rule.chapters}
    assert {*named, *rules.GIVEN, *rules.FILES} <= set(rules.CHAPTERS)


@pytest.mark.parametrize(
    ("language", "code", "why"),
    [
        ("bash", "pip install x", "a command for the shell"),
        ("", "x", "shows what is printed"),
        ("python out", "x", "shows what is printed"),
        ("py", "# pip\n\n#!pip install", "holds comments alone"),
        ("py", "from accelerate.utils import write_basic_config", "prepares a training"),
        ("py", 'f("DeepFloyd/IF-I-M-v1.0")', "DeepFloyd"),
        ("py", "pipe.load_lora_weights('.')", None),
        ("py", "from huggingface_hub import notebook_login\n\nnotebook_login()", "asks for a password"),
        ("py", "from huggingface_hub import login\nlogin()\npipe()", None),
        ("diff", "+ pipe()", None),
    ],
)
def test_what_is_left_out_has_a_reason(language: str, code: str, why: str | None) -> None:
    reason = rules.why_left_out(Block("any", 1, language, code))
    assert reason is None if why is None else reason is not None and reason.startswith(why)


def test_chapters_are_found_by_name(tmp_path: Path) -> None:
    (tmp_path / "text.md").write_text(TEXT)
    found = command.blocks_of(tmp_path / "text.md", ["other"])
    assert [block.name for block in found["other"]] == ["other[1]", "other[2]"]
    with pytest.raises(InputError, match="has no chapter third; it has first, other"):
        command.blocks_of(tmp_path / "text.md", ["other", "third"])
    with pytest.raises(InputError, match=r"nowhere\.md cannot be read: No such file"):
        command.blocks_of(tmp_path / "nowhere.md", ["first"])


def test_the_cache_is_the_hubs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import hf_hub_download, snapshot_download

    monkeypatch.setattr(cache, "PICTURES", {"http://here/a.png": (8, 4, False), "http://here/b.png": (8, 4, True)})
    place = cache.filled(tmp_path, {"learned_word": ("someone/word", "other/word")})
    assert cache.filled(tmp_path, {"learned_word": ("someone/word", "other/word")}) == place
    hub = place / "hub"
    for name in ("someone/word", "other/word"):
        folder = Path(snapshot_download(name, cache_dir=hub, local_files_only=True))
        assert folder == cache.found(hub, name)
        assert Path(hf_hub_download(name, "learned_embeds.bin", cache_dir=hub)).parent == folder
    with pytest.raises(InputError, match="the cache has no someone/else"):
        cache.found(hub, "someone/else/file")
    pictures = [Image.open(place / "pictures" / cache.picture_name(f"http://here/{name}.png")) for name in "ab"]
    assert [picture.size for picture in pictures] == [(8, 4)] * 2
    mask = np.asarray(pictures[1])[..., 0]
    assert mask[2, 4] == 255
    assert mask[0, 0] == 0

    shelf = running.Shelf(place / "pictures")
    opened = urllib.request.build_opener(shelf).open("http://here/b.png")
    assert np.array_equal(np.asarray(Image.open(opened))[..., 0], mask)
    answer = shelf.send(None, requests.Request("GET", "http://here/a.png").prepare())
    assert Image.open(answer.raw).size == (8, 4)
    with pytest.raises(ConnectionError, match="no picture lies here for http://elsewhere"):
        urllib.request.build_opener(shelf).open("http://elsewhere/")


def test_blocks_share_names_and_go_on_after_one_that_fails() -> None:
    codes = {"1": "x = 1\nx", "2": "x = 2\nraise ValueError('first\\nsecond')", "3": "y = x + 1", "5": "z",
             "6": "def broken(:", "7": "images = [picture, picture]"}  # fmt: skip
    kept: dict[str, Any] = {}
    names: dict[str, Any] = {"picture": Image.new("RGB", (3, 2), (1, 2, 3))}
    lines = list(running.results(codes, names, kept.__setitem__))
    assert [line["number"] for line in lines] == [1, 2, 3, 5, 6, 7]
    assert [line["error"] for line in lines[:3]] == [None, "ValueError: first", None]
    assert lines[3]["error"] == "NameError: name 'z' is not defined"
    assert lines[4]["error"].startswith("SyntaxError: ")
    assert names["y"] == 3
    assert {number: pictures.shape for number, pictures in kept.items()} == {"7": (2, 2, 3, 3)}
    assert json.loads(json.dumps(lines)) == lines


def test_a_chapter_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    place = cache.filled(tmp_path / "cache", {"learned_word": ("someone/word",)})
    code = ["import os, sys\nimport diffusers",
            "here = os.environ['HF_HUB_OFFLINE'], 'diffusers' in sys.modules", "here[2]",
            "from PIL import Image\nimage = Image.new('L', (2, 2))\nimage", "os._exit(3)", "never"]  # fmt: skip
    found = [Block("mine", number, "py", text) for number, text in enumerate(code, 1)]
    outcomes = command.run_chapter("mine", found, "anamorph", place, "cpu", tmp_path / "kept")
    assert [one.error for one in outcomes[:4]] == [None, None, "IndexError: tuple index out of range", None]
    assert [one.error for one in outcomes[4:]] == ["not reached: the process ended with code 3: without a word"] * 2
    assert np.load(tmp_path / "kept" / "4.npy").tolist() == [[[0, 0], [0, 0]]]


def test_counts_and_differences_are_told(tmp_path: Path) -> None:
    found = {"first": blocks()[:4], "other": blocks()[4:]}
    outcomes = [Result("first", number, "anamorph", 1.0, error) for number, error in ((2, "KeyError: x"), (3, None))]
    outcomes += [Result("other", 1, "anamorph", 1.0, None)]
    lines = report(found, outcomes, {"first[3]": 2.0}, ["anamorph"], "cpu").splitlines()
    assert [line.split() for line in lines[1:5]] == [
        ["chapter", "blocks", "anamorph"], ["first", "4", "1", "/", "2"], ["other", "2", "1", "/", "1"],
        ["all", "6", "2", "/", "3"],
    ]  # fmt: skip
    assert "  anamorph: first[2]: KeyError: x" in lines
    assert "  shows what is printed: other[2]" in lines
    assert "  first[3]: 2" in lines

    block = Block("first", 3, "py", "image = pipe(generator=g).images[0]")
    for library, value in (("anamorph", 7), ("diffusers", 10)):
        (tmp_path / library / "first").mkdir(parents=True)
        np.save(tmp_path / library / "first" / "3.npy", np.full((1, 2, 2, 3), value, np.uint8))
    assert command.differences(tmp_path, [block]) == {"first[3]": 3.0}
    np.save(tmp_path / "diffusers" / "first" / "3.npy", np.zeros((1, 2, 3, 3), np.uint8))
    assert command.differences(tmp_path, [block]) == {"first[3]": float("inf")}
    assert command.differences(tmp_path, [Block("first", 3, "py", "image = pipe().images[0]")]) == {}
