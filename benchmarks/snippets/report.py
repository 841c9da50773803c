"""The counts as text: a table of chapters, what failed, what was left out and why, and what was changed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from anamorph.benchmarks.snippets import rules
from anamorph.benchmarks.snippets.reading import Block


@dataclass(frozen=True)
class Result:
    """What came of one block with one library; `error` is one line, None where it ran."""

    chapter: str
    number: int
    library: str
    seconds: float
    error: str | None


def report(
    found: Mapping[str, Sequence[Block]],
    outcomes: Sequence[Result],
    apart: Mapping[str, float],
    libraries: Sequence[str],
    device: str,
) -> str:
    """All sections, one after the other."""
    every = [block for blocks in found.values() for block in blocks]
    failed = [f"{one.library}: {one.chapter}[{one.number}]: {one.error}" for one in outcomes if one.error]
    compared = [f"{name}: {value:g}" for name, value in apart.items()]
    sections = {
        "run / total": counts(found, outcomes, libraries),
        "failed": failed,
        "left out": left_out(every),
        "changed": changes(every, libraries, device),
        "pictures of both libraries with the same generator, largest difference of 255": compared,
    }
    return "\n\n".join(
        "\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections.items() if lines
    )


def counts(found: Mapping[str, Sequence[Block]], outcomes: Sequence[Result], libraries: Sequence[str]) -> list[str]:
    """A line per chapter, and one for all."""
    rows = [("chapter", "blocks", *libraries)]
    sizes = {chapter: len(blocks) for chapter, blocks in found.items()}
    for chapter, size in {**sizes, "all": sum(sizes.values())}.items():
        here = [one for one in outcomes if chapter in (one.chapter, "all")]
        cells = []
        for library in libraries:
            ran = [one.error is None for one in here if one.library == library]
            cells.append(f"{sum(ran)} / {len(ran)}")
        rows.append((chapter, str(size), *cells))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def left_out(every: Sequence[Block]) -> list[str]:
    """Reason: the blocks."""
    groups: dict[str, list[str]] = {}
    for block in every:
        if (why := rules.why_left_out(block)) is not None:
            groups.setdefault(why, []).append(block.name)
    return [f"{why}: {', '.join(names)}" for why, names in groups.items()]


def changes(every: Sequence[Block], libraries: Sequence[str], device: str) -> list[str]:
    """Rule, reason and how many blocks it changed; and what is given to chapters."""
    used: Counter[tuple[str, str]] = Counter()
    for block in every:
        if rules.why_left_out(block) is None:
            both = [rules.adapted(block, library, device)[1] for library in libraries]
            used.update({(rule.name, rule.why) for applied in both for rule in applied})
    lines = [f"{name} ({count} blocks): {why}" for (name, why), count in used.items()]
    for chapter in dict.fromkeys(block.chapter for block in every):
        if chapter in rules.GIVEN:
            bound = "; ".join(rules.GIVEN[chapter].splitlines())
            lines.append(f"given to {chapter}, which uses names that it never binds: {bound}")
        if chapter in rules.FILES:
            lines.append(f"in the working folder of {chapter}: {', '.join(rules.FILES[chapter])}")
    return lines
