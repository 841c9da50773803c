"""The plug-in of `examples/plugin-jax`, whose own tests need JAX: it must keep up with what our models trace to."""

import re
from pathlib import Path

from exported import trace_once

from anamorph.checkpoint import Source, open_checkpoint
from anamorph.denoiser_interfaces import even
from anamorph.exporters.references import load
from anamorph.exporters.settling import read_components

TABLE = Path(__file__).parent.parent / "examples" / "plugin-jax" / "src" / "anamorph_jax" / "operators.py"


def test_its_table_has_every_operation_of_stable_diffusion(sd1: Path) -> None:
    table = set(re.findall(r'"((?:\w+\.\w+\.\w+)|<built-in function \w+>)":', TABLE.read_text(encoding="utf-8")))
    missing: dict[str, set[str]] = {}
    for component in read_components(open_checkpoint(Source(str(sd1)))):
        module = load(component)
        for part in component.parts:
            program = trace_once(module, module.method(part), even(component.interface(part), component.config))
            used = {str(node.target) for node in program.graph.nodes if node.op == "call_function" and node.users}
            missing[part] = used - table
    assert not set().union(*missing.values()), missing
    assert {"unet", "vae_decoder", "text_encoder"} <= set(missing)
