"""Running all checks on an engine, for people and for tables."""

from collections.abc import Sequence
from dataclasses import dataclass

from anamorph.errors import AnamorphError, BackendUnavailable
from anamorph.testing.subject import Broken, Check, subject

PASSED, FAILED, NOT_HERE = "passed", "failed", "not on this machine"


@dataclass(frozen=True)
class Result:
    """How one check ended; `reason` says why it did not pass."""

    engine: str
    check: str
    outcome: str
    reason: str = ""


def run(engine: str, checks: Sequence[Check], device: str | None = None, precision: str | None = None) -> list[Result]:
    """All checks on one engine; one that fails does not keep the others from running."""
    try:
        about = subject(engine, device, precision)
    except BackendUnavailable as error:
        return [Result(engine, check.name, NOT_HERE, str(error)) for check in checks]
    except AnamorphError as error:
        return [Result(engine, check.name, FAILED, str(error)) for check in checks]
    results = []
    for check in checks:
        try:
            check(about)
        except (Broken, AnamorphError) as error:
            results.append(Result(engine, check.name, FAILED, str(error)))
        except Exception as error:  # of an engine, which may raise anything
            results.append(Result(engine, check.name, FAILED, f"{type(error).__name__}: {error}"))
        else:
            results.append(Result(engine, check.name, PASSED))
    return results
