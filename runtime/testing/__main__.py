"""`python -m anamorph.testing ENGINE ...`: which demands of the contract engines keep."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from anamorph.cli import DIFFERENT, FAILED, OK
from anamorph.engine import Backend, kind_of
from anamorph.errors import AnamorphError
from anamorph.files import replacing
from anamorph.guard import missing, places_here
from anamorph.plugins import get_backend, list_backends
from anamorph.testing import CHECKS, run
from anamorph.testing.suite import FAILED as BROKEN
from anamorph.testing.suite import Result
from anamorph.testing.table import Place, read, replaced, said, table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite and print a line per check; 3 where one failed."""
    parser = argparse.ArgumentParser(prog="python -m anamorph.testing", description=__doc__)
    parser.add_argument("engines", nargs="*", metavar="ENGINE", help="default: all but test doubles")
    parser.add_argument("--readme", metavar="FILE", help="write what was found into the table of this file")
    options = parser.parse_args(arguments)
    try:
        every = [one for _, one in sorted(list_backends().items()) if not one.double]
        chosen = [get_backend(name) for name in options.engines] or [one for one in every if missing(one) is None]
        found = {place: _tried(*place) for backend in chosen for place in _places(backend)}
        if options.readme is not None:
            _write(Path(options.readme), every, {place: said(results) for place, results in found.items()})
    except (AnamorphError, OSError) as error:
        print(f"anamorph: {error}", file=sys.stderr)
        return FAILED
    lost = any(result.outcome == BROKEN for results in found.values() for result in results)
    return DIFFERENT if lost else OK


def _places(backend: Backend) -> list[Place]:
    """Everything that the engine serves on the first device of each kind here."""
    firsts: dict[str, str] = {}
    for device in places_here(backend):
        firsts.setdefault(kind_of(device), device)
    return [(backend.name, kind, name) for kind, device in firsts.items() for name in places_here(backend)[device]]


def _tried(engine: str, device: str, precision: str) -> list[Result]:
    results = run(engine, CHECKS, device, precision)
    for result in results:
        print(f"{engine:<12} {device:<6} {precision:<10} {result.check:<18} {result.outcome} {result.reason}".rstrip())
    return results


def _write(file: Path, backends: Sequence[Backend], cells: dict[Place, str]) -> None:
    """What was not tried now stays as it is."""
    text = file.read_text(encoding="utf-8")
    with replacing(file) as draft:
        draft.write_text(replaced(text, table(backends, {**read(text), **cells})), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
