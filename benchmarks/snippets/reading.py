"""Chapters and code blocks of a documentation text that joins many pages."""

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from anamorph.errors import InputError

PAGE = re.compile(r"^### .*\n+https?://\S+/(?P<name>[^/\s]+)\.md\s*$", re.MULTILINE)
"""Where a page begins: its heading, and its address on the next line."""
FENCE = re.compile(r"^(?P<margin>[ >]*)```(?P<language>[^`]*)$")
PROMPT = re.compile(r"^(?:>>>|\.\.\.)(?: |$)")
"""How a line begins that a person types into an interactive session."""


@dataclass(frozen=True)
class Block:
    """The code between two fences: which one of its chapter, from 1, and what its fence says it is."""

    chapter: str
    number: int
    language: str
    code: str

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"{self.chapter}[{self.number}]"


def chapters(text: str) -> dict[str, str]:
    """Name of each page (the end of its address) -> its text; of two pages of one name, the first.

    Raises InputError: there is no page.
    """
    found: dict[str, str] = {}
    heads = list(PAGE.finditer(text))
    if not heads:
        raise InputError("no page was found; expected headings '### title', each followed by its address ending in .md")
    for head, following in zip(heads, [*heads[1:], None], strict=True):
        found.setdefault(head["name"], text[head.end() : following.start() if following else None])
    return found


def blocks(chapter: str, text: str) -> list[Block]:
    """The code blocks of a chapter in order, without margins, prompts and what is printed below them."""
    return [Block(chapter, number, language, _typed(code))
            for number, (language, code) in enumerate(_fenced(text.splitlines()), 1)]  # fmt: skip


def _fenced(lines: list[str]) -> Iterator[tuple[str, str]]:
    language, margin, inside = "", "", list[str]()
    opened = False
    for line in lines:
        fence = FENCE.match(line)
        if fence is None:
            if opened:
                inside.append(line.removeprefix(margin) if ">" in margin else line)
        elif opened:
            yield language, textwrap.dedent("\n".join(inside))
            opened = False
        else:
            opened, language, margin, inside = True, fence["language"].strip().lower(), fence["margin"], []


def _typed(code: str) -> str:
    """What a person types: of an interactive session the lines after prompts, of other code all."""
    lines = code.splitlines()
    if not any(line.startswith(">>>") for line in lines):
        return code
    return "\n".join(PROMPT.sub("", line) for line in lines if PROMPT.match(line) or not line.strip())
