"""The contract of engines and exporters as a suite that any plug-in runs: what we test ours by.

In a plug-in's own tests:

    import pytest
    from anamorph import testing

    @pytest.mark.parametrize("check", testing.CHECKS, ids=str)
    def test_contract(check: testing.Check) -> None:
        check(testing.subject("my-engine"))

On a command line: `python -m anamorph.testing my-engine`. PyTorch must be installed: its eager engine is the reference.
"""

from anamorph.testing.checks import ENGINE_CHECKS
from anamorph.testing.exports import EXPORTER_CHECKS
from anamorph.testing.subject import Broken, Check, Subject, subject
from anamorph.testing.suite import Result, run

__all__ = ["CHECKS", "Broken", "Check", "Result", "Subject", "run", "subject"]

CHECKS: tuple[Check, ...] = (*ENGINE_CHECKS, *EXPORTER_CHECKS)
"""Everything that is asked; checks of exporters pass where the engine opens checkpoints itself."""
