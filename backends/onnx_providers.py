"""Execution providers of ONNX Runtime by name, what they are told, and which of them really runs each operator.

ONNX Runtime gives every operator that a provider does not take to the processor without a word, and a provider whose
libraries are missing gives up all of them. Both are read back here, and refused unless the caller allows it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from anamorph.backends.numpy_program import imported
from anamorph.engine import Target
from anamorph.errors import BackendError
from anamorph.interface import Interface


@dataclass(frozen=True)
class Provider:
    """One provider: its `name` in ONNX Runtime, and the kind of memory that inputs and outputs are bound to (or None).

    `static`: it takes graphs of one size alone.
    """

    name: str
    bound: str | None = None
    static: bool = False


HOST = "CPUExecutionProvider"
PROVIDERS: Mapping[str, Provider] = MappingProxyType({
    "cpu": Provider(HOST),
    "cuda": Provider("CUDAExecutionProvider", "cuda"),
    "tensorrt": Provider("TensorrtExecutionProvider", "cuda"),
    "coreml": Provider("CoreMLExecutionProvider"),
    "directml": Provider("DmlExecutionProvider", "dml"),
    "rocm": Provider("ROCMExecutionProvider", "cuda"),
    "migraphx": Provider("MIGraphXExecutionProvider", "cuda"),
    "openvino": Provider("OpenVINOExecutionProvider"),
    "qnn": Provider("QNNExecutionProvider", static=True),
})  # fmt: skip
"""Name of a device -> its provider (onnxruntime.ai/docs/execution-providers)."""
SIZES = frozenset({
    "Shape", "Size", "Gather", "Slice", "Concat", "Unsqueeze", "Squeeze", "Cast", "Mul", "Div", "Add", "Sub", "Range",
    "Reshape", "ConstantOfShape", "Equal", "Where", "Identity", "Constant",
})  # fmt: skip
"""Operators that compute sizes and numbers: providers leave these on the processor on purpose."""
OWN_SIZES = "own_sizes"
OPTIONS = {
    "strict": "yes (the default) refuses a graph of which the provider runs a part alone; no lets the processor help",
    OWN_SIZES: "how many sizes that are called often get a model of their own, which packs weights once more (0, the "
    "default: on processors it was no faster)",
    "provider.*": "an option of the execution provider by its own name, such as provider.device_id=1",
}
STRICT = {"yes": True, "no": False, "True": True, "False": False}
OWN = "MultiHeadAttention"
"""The operation of the rewrite fused-attention, which not every provider has."""
RECORD = "session.record_ep_graph_assignment_info"


def available() -> tuple[str, ...]:
    """Devices whose provider this build of ONNX Runtime has, the processor first: others may lack their hardware."""
    found = imported("onnxruntime", "onnx").get_available_providers()
    return tuple(name for name, one in PROVIDERS.items() if one.name in found)


@dataclass(frozen=True)
class Choice:
    """A provider with what it is told."""

    device: str
    options: Mapping[str, str]
    strict: bool
    own_sizes: int = 0

    @classmethod
    def of(cls, target: Target) -> "Choice":
        """What a target asks for; raises BackendError: an option has a value that it does not take."""
        told = dict(target.options)
        strict = told.pop("strict", "yes")
        if strict not in STRICT:
            raise BackendError(f"option strict of onnxruntime is {strict!r}, expected yes or no")
        sizes = told.pop(OWN_SIZES, "0")
        if not sizes.isdecimal() or (int(sizes) and target.device != "cpu"):
            raise BackendError(f"option {OWN_SIZES} of onnxruntime is {sizes!r}, expected a number, and the device cpu")
        own = {name.removeprefix("provider."): value for name, value in told.items()}
        return cls(target.device, own, STRICT[strict], int(sizes))

    @property
    def provider(self) -> Provider:
        """The provider."""
        return PROVIDERS[self.device]

    @property
    def plain(self) -> bool:
        """Whether it is the processor as it comes."""
        return self.provider.name == HOST and not self.options

    def listed(self) -> list[tuple[str, dict[str, str]]]:
        """What a session is told: the provider, and the processor for what that does not take."""
        chosen = [(self.provider.name, dict(self.options))]
        return chosen if self.provider.name == HOST else [*chosen, (HOST, {})]

    def check_sizes(self, part: str, interface: Interface) -> None:
        """Raise BackendError where a graph of open sizes would go to a provider that takes one size alone."""
        loose = [name for name, axis in interface.axes.items() if axis.minimum != axis.maximum]
        if self.provider.static and loose:
            raise BackendError(
                f"provider {self.device} takes graphs of one size, but {part} leaves {', '.join(loose)} open; "
                "export it with --static HxW --batch N"
            )

    def assigned(self, session: Any) -> dict[str, str]:
        """Details for the placement: who runs how many operators, read back from an opened session.

        Raises BackendError: the provider was dropped, or where `strict`, it does not run all operators but those that
        compute sizes; the sentence names these.
        """
        if session.get_providers()[0] != self.provider.name:
            raise BackendError(
                f"ONNX Runtime has dropped {self.provider.name}: its libraries or its device are missing here; install "
                "them, or leave the device out"
            )
        counts, strangers = self._counted(session.get_provider_graph_assignment_info())
        if self.strict and strangers:
            own = ", leave the rewrite fused-attention out" * any(OWN in kind for kind in strangers)
            raise BackendError(
                f"{self.provider.name} leaves {', '.join(strangers)} to the processor; pass the option strict=no "
                f"to allow that{own}, or take another device"
            )
        return {"operators": ", ".join(f"{count} by {name}" for name, count in counts.items())}

    def _counted(self, subgraphs: Sequence[Any]) -> tuple[dict[str, int], list[str]]:
        """Provider -> number of its operators, and the kinds that others run than the chosen one."""
        counts: dict[str, int] = {}
        strangers: dict[str, int] = {}
        for subgraph in subgraphs:
            for node in subgraph.get_nodes():
                counts[subgraph.ep_name] = counts.get(subgraph.ep_name, 0) + 1
                if subgraph.ep_name != self.provider.name and node.op_type not in SIZES:
                    strangers[node.op_type] = strangers.get(node.op_type, 0) + 1
        return counts, [f"{count} {kind}" for kind, count in sorted(strangers.items())]

    def run(self, session: Any, names: Sequence[str], values: Mapping[str, Any]) -> list[Any]:
        """Run a session; where the provider has memory of its own, inputs and outputs are bound to it."""
        kind = self.provider.bound
        if kind is None:
            found: list[Any] = session.run(list(names), dict(values))
            return found
        number, binding = int(self.options.get("device_id", "0")), session.io_binding()
        make = imported("onnxruntime", "onnx").OrtValue.ortvalue_from_numpy
        for name, value in values.items():
            binding.bind_ortvalue_input(name, make(value, kind, number))
        for name in names:
            binding.bind_output(name, kind, number)
        session.run_with_iobinding(binding)
        results: list[Any] = binding.copy_outputs_to_cpu()
        return results
