"""The whole contract, and what is the plug-in's own."""

import pytest
from anamorph_tape.backend import function

from anamorph import testing
from anamorph.errors import ArtifactError


@pytest.mark.parametrize("check", testing.CHECKS, ids=str)
def test_contract(check: testing.Check) -> None:
    check(testing.subject("tape"))


@pytest.mark.parametrize("name", ["eval", "os.system", "aten.from_file.default"])
def test_a_strangers_tape_calls_nothing_but_operations_on_tensors(name: str) -> None:
    with pytest.raises(ArtifactError, match="refused"):
        function(name)
