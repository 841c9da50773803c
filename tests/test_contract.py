"""What the contract of a component has to carry before it sets: each test pushes one thing through both engines.

Residuals of a ControlNet, factors of a LoRA, keys and values computed once per image, a transformer instead of a UNet,
and two denoisers in one picture.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from exported import FORMATS, exported, opened, trace_once
from numpy.typing import NDArray
from parity import relative
from torch import Tensor, nn

from anamorph import StableDiffusionPipeline, UNet2DConditionModel
from anamorph.denoiser_interfaces import even, unet_interface
from anamorph.engine import Session
from anamorph.errors import InputError
from anamorph.interface import Axis, Interface, Port, Scaled
from anamorph.model_interfaces import interfaces
from anamorph.models.dit import DiTTransformer2DModel
from anamorph.pipelines.denoiser import Opened
from anamorph.pipelines.denoising import denoise
from anamorph.pipelines.sampling import Plan

BOUND = 1e-5
BATCH, SEQUENCE = Axis("batch"), Axis("sequence")


def normal(seed: int, *shape: int) -> NDArray[Any]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def tensors(values: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in values.items()}


@pytest.fixture(scope="module")
def unet(sd2: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(sd2 / "unet").eval()


def call(unet: UNet2DConditionModel, batch: int = 2, side: int = 8) -> dict[str, NDArray[Any]]:
    """One call of the denoiser without anything optional."""
    return {
        "sample": normal(1, batch, 4, side, 2 * side),
        "timestep": np.array(501.5, np.float32),
        "encoder_hidden_states": normal(2, batch, 77, unet.config.cross_attention_dim),
    }


@pytest.mark.parametrize("engine", FORMATS)
def test_one_graph_serves_with_and_without_the_residuals_of_a_controlnet_and_an_adapter(
    unet: UNet2DConditionModel, sd2: Path, tmp_path: Path, engine: str
) -> None:
    interface = even(unet_interface(unet.config), unet.config)
    session = opened(engine, tmp_path, trace_once(unet, "denoise", interface), interface)
    inputs = call(unet)
    sizes = {"batch": 2, "latent_height": 8, "latent_width": 16, "sequence": 77}
    optional = [port for port in interface.inputs if port.optional and "block" in port.name]
    shapes = [Interface("", interface.inputs, (port,)).output_shapes(sizes)[port.name] for port in optional]
    residuals = {port.name: normal(9 + n, *shapes[n]) for n, port in enumerate(optional)}
    reference = diffusers.UNet2DConditionModel.from_pretrained(sd2 / "unet")
    values = list(tensors(residuals).values())
    down, mid, inside = values[:4], values[4], values[5:]
    with torch.inference_mode():
        given = list(tensors(inputs).values())
        plain = reference(*given).sample.numpy()
        controlled = reference(
            *given, down_block_additional_residuals=down, mid_block_additional_residual=mid,
            down_intrablock_additional_residuals=inside,
        ).sample.numpy()  # fmt: skip
    assert relative(session(inputs)["out_sample"], plain) <= BOUND
    assert relative(session({**inputs, **residuals})["out_sample"], controlled) <= BOUND
    assert relative(session(inputs)["out_sample"], plain) <= BOUND  # nothing of the last call is left
    assert relative(plain, controlled) > 1e-2
    with pytest.raises(InputError, match=r"down_block_additional_residuals\.0"):
        session({**inputs, optional[0].name: residuals[optional[0].name][:, :, :4]})


class Adapted(nn.Module):
    """A linear layer with the factors of a LoRA (arXiv:2106.09685) among its inputs: x W^T + x A^T B^T."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.factors: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        if self.factors is None:
            return y
        down, up = self.factors
        return y + x @ down.transpose(0, 1) @ up.transpose(0, 1)


class WithFactors(nn.Module):
    """A UNet whose cross-attention queries take factors as further inputs."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet
        self.layers: list[Adapted] = []
        for module in list(unet.modules()):
            if isinstance(attention := getattr(module, "attn2", None), nn.Module):
                attention.to_q = Adapted(attention.to_q)
                self.layers.append(attention.to_q)

    def denoise(self, sample: Tensor, timestep: Tensor, text: Tensor, *factors: Tensor) -> tuple[Tensor]:
        for layer, down, up in zip(self.layers, factors[::2], factors[1::2], strict=True):
            layer.factors = (down, up)
        return self.unet.denoise(sample, timestep, text)


@pytest.mark.parametrize("engine", FORMATS)
def test_factors_of_a_lora_are_inputs_of_any_rank(sd2: Path, tmp_path: Path, engine: str) -> None:
    model = UNet2DConditionModel.from_pretrained(sd2 / "unet").eval()
    wrapped = WithFactors(model)
    ports: list[Port] = []
    for n, layer in enumerate(wrapped.layers):
        rank, width = Axis("rank"), layer.layer.in_features
        ports.append(Port(f"lora.{n}.down", (rank, width), optional=True))
        ports.append(Port(f"lora.{n}.up", (layer.layer.out_features, rank), optional=True))
    plain = even(unet_interface(model.config), model.config).required
    interface = Interface("unet", (*plain.inputs, *ports), plain.outputs)
    session = opened(engine, tmp_path, trace_once(wrapped, "denoise", interface), interface)
    inputs = call(model)
    for rank in (1, 4, 7):
        factors = {
            port.name: 0.1 * normal(31 + n, *(rank if isinstance(axis, Axis) else int(str(axis)) for axis in port.axes))
            for n, port in enumerate(ports)
        }
        fused = UNet2DConditionModel.from_pretrained(sd2 / "unet").eval()
        for n, (name, module) in enumerate(
            (name, module) for name, module in fused.named_modules() if name.endswith("attn2")
        ):
            module.to_q.weight.data += torch.from_numpy(factors[f"lora.{n}.up"] @ factors[f"lora.{n}.down"])  # type: ignore[union-attr, operator]
            assert name
        with torch.inference_mode():
            expected = fused.denoise(*tensors(inputs).values())[0].numpy()
        assert relative(session({**inputs, **factors})["out_sample"], expected) <= BOUND
    untouched = UNet2DConditionModel.from_pretrained(sd2 / "unet").eval()
    with torch.inference_mode():
        expected = untouched.denoise(*tensors(inputs).values())[0].numpy()
    assert relative(session(inputs)["out_sample"], expected) <= BOUND


class Remembered(nn.Module):
    """A projection of the text that was computed before the first step."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.value: Tensor | None = None

    def forward(self, text: Tensor) -> Tensor:
        return self.layer(text) if self.value is None else self.value


class Split(nn.Module):
    """A UNet in two functions over one set of weights: keys and values once per image, then the steps."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet
        self.layers: list[Remembered] = []
        for module in list(unet.modules()):
            if isinstance(attention := getattr(module, "attn2", None), nn.Module):
                attention.to_k, attention.to_v = Remembered(attention.to_k), Remembered(attention.to_v)
                self.layers += [attention.to_k, attention.to_v]

    def context(self, text: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer.layer(text) for layer in self.layers)

    def denoise(self, sample: Tensor, timestep: Tensor, *context: Tensor) -> tuple[Tensor]:
        for layer, value in zip(self.layers, context, strict=True):
            layer.value = value
        return self.unet.denoise(sample, timestep, context[0])


@pytest.mark.parametrize("engine", FORMATS)
def test_keys_and_values_are_a_part_of_their_own(sd2: Path, tmp_path: Path, engine: str) -> None:
    model = UNet2DConditionModel.from_pretrained(sd2 / "unet").eval()
    inputs = call(model)
    with torch.inference_mode():
        expected = model.denoise(*tensors(inputs).values())[0].numpy()
    split = Split(model)
    text = Port("encoder_hidden_states", (BATCH, SEQUENCE, model.config.cross_attention_dim))
    named = [Port(f"context.{n}", (BATCH, SEQUENCE, layer.layer.out_features)) for n, layer in enumerate(split.layers)]
    plain = even(unet_interface(model.config), model.config).required
    steps = Interface("unet", (*plain.inputs[:2], *named), plain.outputs)
    keys = Interface("context", (text,), tuple(named))
    first = opened(engine, tmp_path / "context", trace_once(split, "context", keys), keys)
    then = opened(engine, tmp_path / "steps", trace_once(split, "denoise", steps), steps)
    context = first({"encoder_hidden_states": inputs["encoder_hidden_states"]})
    called = then({"sample": inputs["sample"], "timestep": inputs["timestep"], **context})
    assert relative(called["out_sample"], expected) <= BOUND


DIT: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2,
    "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10, "activation_fn": "gelu-approximate",
    "attention_bias": True, "norm_elementwise_affine": False, "norm_type": "ada_norm_zero", "norm_num_groups": 4,
}  # fmt: skip


@pytest.mark.parametrize("engine", FORMATS)
def test_a_transformer_is_a_denoiser_like_any_other(tmp_path: Path, engine: str) -> None:
    torch.manual_seed(0)
    reference = diffusers.DiTTransformer2DModel(**DIT).eval()
    for value in reference.parameters():
        nn.init.normal_(value, std=0.1)
    reference.save_pretrained(tmp_path / "transformer")
    model = DiTTransformer2DModel.from_pretrained(tmp_path / "transformer").eval()
    interface = interfaces("DiTTransformer2DModel", "transformer")["transformer"](model.config)
    session = opened(engine, tmp_path / "artifact", trace_once(model, "denoise", interface), interface)
    classes = np.array([1, 9, 10])
    inputs = {"sample": normal(3, 3, 4, 8, 8), "timestep": np.array(37, np.float32), "class_labels": classes}
    with torch.inference_mode():
        expected = reference(
            torch.from_numpy(inputs["sample"]),
            torch.tensor([37] * 3),
            torch.from_numpy(classes),  # type: ignore[arg-type]
        ).sample.numpy()
    assert relative(session(inputs)["out_sample"], expected) <= BOUND


def test_two_denoisers_are_one_session_that_chooses(sd1: Path) -> None:
    pipes = {engine: StableDiffusionPipeline.from_pretrained(exported(sd1, engine)) for engine in FORMATS}
    first, second = pipes.values()
    plan = first.plan(first.job("a cat", seed=0, num_inference_steps=4))
    program = first._models["unet"].programs["unet"]
    sessions = [pipe._models["unet"].programs["unet"].session() for pipe in (first, second)]
    boundary = plan.table.rows[2].timestep
    asked: list[int] = []

    def choose(inputs: Mapping[str, Any]) -> dict[str, Any]:
        """High noise to one expert, low noise to the other."""
        asked.append(int(float(inputs["timestep"]) <= boundary))
        return sessions[asked[-1]](inputs)

    both, alone = (run(plan, session, program) for session in (choose, sessions[0]))
    assert asked == [0, 0, 1, 1]
    assert all(relative(a, b) <= 1e-5 for a, b in zip(both, alone, strict=True))


def run(plan: Plan, session: Session, program: Any) -> Sequence[NDArray[Any]]:
    denoiser = Opened(session, program.interface, program.arrays, "both")
    return [np.asarray(step.latents).copy() for step in denoise(plan, denoiser)]


def test_an_absent_input_is_one_wherever_its_size_is_open() -> None:
    port = Port(
        "residual", (BATCH, 8, Scaled("latent_height", 1, 2), Axis("rank", minimum=4, maximum=4)), optional=True
    )
    interface = Interface("unet", (Port("sample", (BATCH, 4, Axis("latent_height", 2, 2))), port), ())
    assert interface.absent(port) == (1, 8, 1, 4)
    fixed = interface.limited({"latent_height": Axis("latent_height", 2, 16, 16)})
    assert fixed.absent(fixed.inputs[1]) == (1, 8, 8, 4)
    assert [port.name for port in interface.required.inputs] == ["sample"]
