"""T2I-Adapters: features and pictures are diffusers', and pictures are looked at once."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from checkpoints import noisy
from exported import FORMATS, once, shared_place
from parity import LATENT_BOUND, Agrees, Trace, generator, ours, relative, worst
from test_controlnet import picture

import anamorph
from anamorph import DiffusionPipeline, MultiAdapter, T2IAdapter
from anamorph.errors import ConfigError, InputError

KINDS = {
    "full_adapter": {"channels": (16, 32, 64), "num_res_blocks": 2, "downscale_factor": 2},
    "full_adapter_xl": {"channels": (16, 32, 64, 64), "num_res_blocks": 1, "downscale_factor": 4},
    "light_adapter": {"channels": (16, 32), "num_res_blocks": 2, "downscale_factor": 2, "in_channels": 1},
}


def adapter(seed: int, **config: Any) -> Any:
    return noisy(diffusers.T2IAdapter(**config), seed)


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_diffusers(kind: str, tmp_path: Path) -> None:
    theirs = adapter(3, **KINDS[kind], adapter_type=kind)
    theirs.save_pretrained(tmp_path)
    mine = T2IAdapter.from_pretrained(tmp_path)
    x = torch.rand(2, theirs.config.in_channels, 24, 32, generator=torch.Generator().manual_seed(0))
    for size in ((24, 32), (20, 28)):  # the second does not halve evenly
        with torch.no_grad():
            pairs = list(zip(mine(x[..., : size[0], : size[1]]), theirs(x[..., : size[0], : size[1]]), strict=True))
        assert all(relative(a.numpy(), b.numpy()) <= 1e-6 for a, b in pairs)
    assert mine.total_downscale_factor == theirs.total_downscale_factor
    mine.save_pretrained(tmp_path / "again")
    again = diffusers.T2IAdapter.from_pretrained(tmp_path / "again")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in theirs.state_dict().items())


def reference(pipe: Any, seed: int, **call: Any) -> Trace:
    """diffusers' pictures; its adapters' pipelines hand out no steps but to an old kind of callback."""
    latents: list[Any] = []
    images = pipe(**call, generator=generator(seed), output_type="np",
                  callback=lambda _step, _time, x: latents.append(x.numpy().copy())).images  # fmt: skip
    return Trace(latents, images)


@pytest.fixture(scope="module")
def adapted(sd2: Path) -> Path:
    def make(place: Path) -> None:
        nets = [adapter(seed, channels=(32, 64), num_res_blocks=1, downscale_factor=2) for seed in (3, 4)]
        pipe = diffusers.StableDiffusionAdapterPipeline.from_pretrained(sd2, adapter=nets, safety_checker=None)
        pipe.save_pretrained(place)

    return once(shared_place() / "adapted-sd2", make)


@pytest.fixture(scope="module")
def adapted_xl(sdxl: Path) -> Path:
    def make(place: Path) -> None:
        net = adapter(5, channels=(32, 64), num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter_xl")
        diffusers.StableDiffusionXLAdapterPipeline.from_pretrained(sdxl, adapter=net).save_pretrained(place)

    return once(shared_place() / "adapted-xl", make)


CALL: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 4}
PAIR = [picture(1, 16, 24), picture(2, 16, 24)]


def test_several_adapters_add_up(adapted: Path, agrees: Agrees) -> None:
    theirs = diffusers.StableDiffusionAdapterPipeline.from_pretrained(adapted, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    pipe: Any = anamorph.StableDiffusionAdapterPipeline.from_pretrained(adapted, backend="eager")
    assert isinstance(pipe.adapter, MultiAdapter)
    call = {**CALL, "image": PAIR, "adapter_conditioning_scale": [0.6, 1.1]}
    found = ours(pipe, 0, **call)
    agrees("StableDiffusionAdapterPipeline", worst(found, reference(theirs, 0, **call)))
    plain: Any = anamorph.StableDiffusionPipeline.from_pipe(pipe)
    without = ours(plain, 0, **CALL, height=16, width=24)
    assert relative(found.latents[-1], without.latents[-1]) > 1e-2
    silent = ours(pipe, 0, **call, adapter_conditioning_factor=0.0)
    assert relative(silent.latents[-1], without.latents[-1]) <= LATENT_BOUND


@pytest.mark.parametrize("turn", [{}, {"adapter_conditioning_factor": 0.6, "adapter_conditioning_scale": 0.7}])
def test_sdxl_follows_for_a_part_of_the_steps(turn: dict[str, Any], adapted_xl: Path, agrees: Agrees) -> None:
    theirs = diffusers.StableDiffusionXLAdapterPipeline.from_pretrained(adapted_xl)
    theirs.set_progress_bar_config(disable=True)
    pipe: Any = anamorph.StableDiffusionXLAdapterPipeline.from_pretrained(adapted_xl, backend="eager")
    call = {**CALL, "image": picture(1, 16, 24), **turn}
    agrees("StableDiffusionXLAdapterPipeline", worst(ours(pipe, 0, **call), reference(theirs, 0, **call)))


@pytest.mark.parametrize("engine", FORMATS)
def test_engines_follow_as_eager_does(engine: str, sd2: Path, adapted: Path, agrees: Agrees) -> None:
    call = {**CALL, "image": PAIR, "adapter_conditioning_scale": [0.6, 1.1]}
    eager = ours(DiffusionPipeline.from_pretrained(adapted, backend="eager"), 0, **call)
    nets = [str(adapted / name) for name in ("adapter", "adapter_1")]
    pipe = anamorph.StableDiffusionAdapterPipeline.from_pretrained(sd2, adapter=nets, backend=engine)
    assert {placed.engine for placed in pipe.placement.values()} == {engine}
    agrees("StableDiffusionAdapterPipeline", worst(ours(pipe, 0, **call), eager), engine)


def test_an_adapter_that_does_not_fit_is_refused(adapted: Path) -> None:
    for net, said in (
        (T2IAdapter(channels=(32, 48), downscale_factor=2), "48 channels"),
        (T2IAdapter(channels=(32, 64), downscale_factor=8), "8 pixels"),
        (T2IAdapter(channels=(32,), downscale_factor=2), "1 features"),
    ):
        with pytest.raises(ConfigError, match=said):
            anamorph.StableDiffusionAdapterPipeline.from_pretrained(adapted, adapter=net, backend="eager")
    pipe: Any = DiffusionPipeline.from_pretrained(adapted, backend="eager")
    for wrong, said in (
        ({"image": PAIR[:1]}, "holds 1 pictures for 2"),
        ({"image": PAIR, "adapter_conditioning_scale": [1.0]}, "1 numbers for 2"),
        ({"image": PAIR, "adapter_conditioning_factor": 1.5}, "expected 0 to 1"),
    ):
        with pytest.raises(InputError, match=said):
            pipe.job(**CALL, **wrong)
