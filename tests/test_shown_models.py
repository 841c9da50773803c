"""Models as attributes of pipelines: looked into, called, compiled, traced, replaced by strangers' modules."""

import functools
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from checkpoints import tiny_sd1
from parity import IMAGE_BOUND
from torch import Tensor, nn

from anamorph import DDPMPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from anamorph.errors import InputError
from anamorph.models.attention import multi_head
from anamorph.models.attention_processor import AttnProcessor, AttnProcessor2_0

CALL: dict[str, Any] = {"num_inference_steps": 2, "seed": 1, "output_type": "np"}


@pytest.fixture
def pipe(sd2: Path) -> Any:
    return StableDiffusionPipeline.from_pretrained(sd2, backend="eager")


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {"sample": torch.randn(2, 4, 8, 8, generator=draw), "timestep": torch.tensor(7.0),
            "encoder_hidden_states": torch.randn(2, 77, 32, generator=draw)}  # fmt: skip


def test_what_pytorch_runs_is_pytorchs_module(pipe: Any, sd2: Path, inputs: dict[str, Tensor]) -> None:
    theirs: Any = diffusers.UNet2DConditionModel.from_pretrained(sd2, subfolder="unet")
    unet = pipe.unet
    assert isinstance(unet, nn.Module)
    assert unet is pipe.unet
    assert {name: value.shape for name, value in unet.state_dict().items()} == {
        name: value.shape for name, value in theirs.state_dict().items()
    }
    assert torch.equal(unet.conv_out.weight, theirs.conv_out.weight)
    assert (unet.dtype, str(unet.device), unet.config.in_channels) == (torch.float32, "cpu", 4)
    assert repr(unet).startswith("UNet2DConditionModel(")
    with torch.no_grad():
        assert torch.allclose(unet(**inputs).sample, theirs(**inputs).sample, atol=1e-5)
    with pytest.warns(UserWarning, match="this forward serves direct calls"):
        unet.forward = lambda: 3
    assert unet() == 3
    with pytest.raises(AttributeError, match="conv_middle"):
        unet.conv_middle  # noqa: B018
    graph: Any = StableDiffusionPipeline.from_pretrained(sd2, backend="null")
    assert graph.unet.config.in_channels == 4
    assert not isinstance(graph.unet, nn.Module)


def test_a_compiled_model_is_what_the_pipeline_calls(pipe: Any) -> None:
    plain, calls = pipe("a cat", **CALL).images, list[int]()

    def counting(graph: Any, _: Any) -> Any:
        def run(*given: Any) -> Any:
            calls.append(len(given))
            return graph(*given)

        return run

    compiled = torch.compile(pipe.unet, backend=counting, fullgraph=True)
    pipe.unet = compiled
    assert pipe.unet is compiled
    assert str(pipe.placement["unet"]) == "unet: eager on cpu in float32, calling OptimizedModule"
    assert np.abs(pipe("a cat", **CALL).images - plain).max() <= 1e-5  # strangers are told everything at every step
    assert len(calls) == 2
    second: Any = StableDiffusionPipeline(**{**pipe.components, "unet": compiled})
    assert np.abs(second("a cat", **CALL).images - plain).max() <= 1e-5
    assert len(calls) == 4


class Passing(nn.Module):
    """Hands a call on, by diffusers' names."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **more: Any) -> Any:
        assert sorted(more) == ["added_cond_kwargs"]
        assert sorted(more["added_cond_kwargs"]) == ["text_embeds", "time_ids"]
        return self.model(sample, timestep, encoder_hidden_states, **more)


def test_models_that_were_compiled_before_and_further_conditions(sd1: Path, sdxl: Path) -> None:
    compiled = torch.compile(UNet2DConditionModel.from_pretrained(sd1, subfolder="unet"), backend="eager")
    first: Any = StableDiffusionPipeline.from_pretrained(sd1, backend="eager", unet=compiled)
    assert first.unet is compiled
    assert first.placement["unet"].details == {"calling": "OptimizedModule"}
    large: Any = StableDiffusionXLPipeline.from_pretrained(sdxl, backend="eager")
    expected = large("a cat", **CALL).images
    large.unet = Passing(large.unet)
    assert np.abs(large("a cat", **CALL).images - expected).max() <= 1e-5


class Traced(nn.Module):
    """A module without a configuration, as the documentation of diffusers writes it."""

    def __init__(self, traced: Any, factor: float = 1.0) -> None:
        super().__init__()
        self.traced, self.factor = traced, factor

    def forward(self, latents: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> Any:
        return (self.factor * self.traced(latents, t, encoder_hidden_states)[0],)


def test_a_traced_model_draws_the_same(pipe: Any, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    plain, model = pipe("a cat", height=32, width=64, **CALL).images, pipe.unet
    with pytest.warns(UserWarning, match="serves direct calls"):
        model.forward = functools.partial(model.forward, return_dict=False)
    with torch.no_grad(), pytest.warns(torch.jit.TracerWarning):
        torch.jit.trace(model, tuple(inputs.values())).save(tmp_path / "unet.pt")  # other sizes must do, too
    pipe.unet = Traced(torch.jit.load(tmp_path / "unet.pt"))
    assert np.abs(pipe("a cat", height=32, width=64, **CALL).images - plain).max() <= IMAGE_BOUND
    pipe.unet = Traced(torch.jit.load(tmp_path / "unet.pt"), 1.01)
    assert np.abs(pipe("a cat", height=32, width=64, **CALL).images - plain).max() > 10 * IMAGE_BOUND
    with pytest.raises(InputError, match="Traced is no model of anamorph and cannot be saved"):
        pipe.save_pretrained(tmp_path / "saved")
    with pytest.raises(InputError, match="attention of Traced cannot be sliced"):
        pipe.enable_attention_slicing()


def test_modules_that_cannot_take_a_place(pipe: Any) -> None:
    class Odd(nn.Module):
        def forward(self, *_: Any, **__: Any) -> str:
            return "odd"

    pipe.unet = Odd()
    with pytest.raises(InputError, match="Odd returned a str, expected a tuple that begins with a tensor"):
        pipe("a cat", **CALL)
    with pytest.raises(InputError, match="vae is a Odd, expected a model of anamorph"):
        pipe.vae = Odd()
    with pytest.raises(InputError, match="unet is a Odd, expected a model of anamorph"):
        DDPMPipeline(Odd(), pipe.scheduler)


def test_attention_can_be_computed_step_by_step(pipe: Any, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        fused = pipe.unet(**inputs).sample
        pipe.unet.set_attn_processor(AttnProcessor())
        plain = pipe.unet(**inputs).sample
        pipe.unet.set_default_attn_processor()
        again = pipe.unet(**inputs).sample
    assert torch.equal(again, fused)
    assert not torch.equal(plain, fused)  # other roundings
    assert torch.allclose(plain, fused, atol=1e-5)
    q = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    bias = torch.randn(2, 1, 1, 5, generator=torch.Generator().manual_seed(1))
    for more in ({"causal": True}, {"bias": bias}, {"bias": bias, "at_once": 2}):
        wanted = multi_head(q, q, q, 3, **more)  # type: ignore[arg-type]
        assert torch.allclose(multi_head(q, q, q, 3, fused=False, **more), wanted, atol=1e-6)  # type: ignore[arg-type]
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    with pytest.raises(InputError, match="the attention processor is a str, expected AttnProcessor"):
        pipe.unet.set_attn_processor("sdpa")


def test_each_attention_has_a_processor_by_the_name_that_diffusers_gives_it(sd2: Path, pipe: Any) -> None:
    theirs = diffusers.UNet2DConditionModel.from_pretrained(sd2, subfolder="unet").attn_processors
    mine = pipe.unet.attn_processors
    assert mine.keys() == theirs.keys()
    first = next(iter(mine))
    pipe.unet.set_attn_processor({**mine, first: AttnProcessor()})
    assert [name for name, one in pipe.unet.attn_processors.items() if isinstance(one, AttnProcessor)] == [first]
    pipe.unet.set_attn_processor(mine)
    assert all(isinstance(one, AttnProcessor2_0) for one in pipe.unet.attn_processors.values())
    with pytest.raises(InputError, match=r"1 processors are given for \d+ attentions"):
        pipe.unet.set_attn_processor({first: AttnProcessor()})
    with pytest.raises(InputError, match=r"adapters of unet are loaded by the pipeline; call pipe.load_lora_weights"):
        pipe.unet.load_attn_procs("somewhere")


def test_variants_are_saved_beside_plain_weights(tmp_path: Path) -> None:
    tiny_sd1(tmp_path / "own")
    pipe: Any = StableDiffusionPipeline.from_pretrained(tmp_path / "own", backend="eager")
    with torch.no_grad():
        pipe.unet.conv_out.bias.add_(1)  # what is saved is what draws here, not what was loaded
    pipe.save_pretrained(tmp_path / "own", variant="mine")
    assert (tmp_path / "own" / "unet" / "diffusion_pytorch_model.mine.safetensors").is_file()
    call = {**CALL, "generator": torch.Generator().manual_seed(1)}
    del call["seed"]
    theirs: Any = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "own", variant="mine")
    theirs.set_progress_bar_config(disable=True)
    mine = pipe("a cat", **CALL).images
    assert np.abs(theirs("a cat", **call).images - mine).max() <= IMAGE_BOUND
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "own", subfolder="unet")
    other: Any = StableDiffusionPipeline.from_pretrained(tmp_path / "own", backend="eager", unet=unet)
    assert np.abs(other("a cat", **CALL).images - mine).max() > 10 * IMAGE_BOUND


def test_the_autoencoder_alone_can_be_widened(sdxl: Path) -> None:
    pipe: Any = StableDiffusionXLPipeline.from_pretrained(sdxl, backend="eager", torch_dtype=torch.bfloat16)
    pipe.upcast_vae()
    precisions = {part: placed.precision for part, placed in pipe.placement.items()}
    assert precisions.pop("vae_decoder") == "float32"
    assert set(precisions.values()) == {"bfloat16"}
    assert pipe.to("cpu").placement["vae_decoder"].precision == "float32"
