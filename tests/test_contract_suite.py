"""Our own engines keep the contract that plug-ins are asked to keep."""

import pytest
from exported import ENGINES

from anamorph import testing


@pytest.mark.parametrize("check", testing.CHECKS, ids=str)
@pytest.mark.parametrize("engine", ["eager", *ENGINES])
def test_contract(engine: str, check: testing.Check) -> None:
    check(testing.subject(engine))
