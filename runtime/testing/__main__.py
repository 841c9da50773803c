"""`python -m anamorph.testing ENGINE ...`: which demands of the contract engines keep."""

import argparse
import sys
from collections.abc import Sequence

from anamorph.cli import DIFFERENT, FAILED, OK
from anamorph.errors import AnamorphError
from anamorph.plugins import get_backend, list_backends
from anamorph.testing import CHECKS, run
from anamorph.testing.suite import FAILED as BROKEN


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite and print a line per check; 3 where one failed."""
    parser = argparse.ArgumentParser(prog="python -m anamorph.testing", description=__doc__)
    parser.add_argument("engines", nargs="*", metavar="ENGINE", help="default: all but test doubles")
    parser.add_argument("--device")
    parser.add_argument("--dtype", metavar="PRECISION", help="float32, bfloat16 or float16")
    options = parser.parse_args(arguments)
    names = options.engines or sorted(name for name, one in list_backends().items() if not one.double)
    lost = 0
    try:
        for name in names:
            if options.engines:
                get_backend(name)
            for result in run(name, CHECKS, options.device, options.dtype):
                lost += result.outcome == BROKEN
                print(f"{result.engine:<12} {result.check:<18} {result.outcome:<20} {result.reason}".rstrip())
    except AnamorphError as error:
        print(f"anamorph: {error}", file=sys.stderr)
        return FAILED
    return DIFFERENT if lost else OK


if __name__ == "__main__":
    sys.exit(main())
