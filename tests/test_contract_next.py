"""What models to come want of the contract, each on eager and through the real exporter on both graph engines.

Transformers with packed latents, position ids and distilled guidance as an input; a frame axis; two denoisers in one
pipeline. The models are small stand-ins; what is compared is a whole loop, with diffusers' scheduler driving the same
model by hand.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import numpy as np
import pytest
import torch
from checkpoints import noisy
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from exported import FORMATS, export, one_process, opened
from numpy.typing import NDArray
from parity import relative
from torch import Tensor, nn

from anamorph import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from anamorph import UNet2DConditionModel as UNet
from anamorph.arrays import Array, Arrays, NumpyArrays
from anamorph.backends.eager import TorchProgram
from anamorph.errors import InputError
from anamorph.exporters.trace import trace
from anamorph.guard import Held
from anamorph.interface import Axis, Interface, Port
from anamorph.models.attention import multi_head
from anamorph.noise import SeededNoise
from anamorph.pipelines.denoiser import NOTHING, Denoiser, Opened, Predict, Refresh
from anamorph.pipelines.denoising import denoise
from anamorph.pipelines.sampling import Guidance, Plan
from anamorph.pipelines.slots import Slots, model
from anamorph.schedulers import Table

ENGINES = ["eager", *FORMATS]
BOUND = 1e-5
BATCH, TOKENS, WORDS = Axis("batch"), Axis("tokens"), Axis("words")
WIDTH, TEXT, PACKED, STEPS = 16, 12, 8, 4
Arrays32 = dict[str, NDArray[np.float32]]


def waves(values: Tensor, width: int) -> Tensor:
    """Sines and cosines of numbers [B] at falling frequencies, [B, width]."""
    angles = values.float()[:, None] * 10 ** -torch.linspace(0, 3, width // 2)
    return torch.cat((angles.sin(), angles.cos()), -1)


class Model(nn.Module):
    """What the eager engine asks of a module."""

    dtype, device = torch.float32, torch.device("cpu")

    def denoise(self, *inputs: Tensor) -> tuple[Tensor]:
        """All inputs of the interface, in order."""
        raise NotImplementedError


class Packed(Model):
    """Words and packed latents attend to one another, turned by the angles of their places (arXiv:2104.09864)."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.see = nn.Linear(TEXT, WIDTH), nn.Linear(PACKED, WIDTH)
        self.when, self.strength = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, PACKED)
        self.norm = nn.LayerNorm(WIDTH)

    def denoise(self, *inputs: Tensor) -> tuple[Tensor]:
        sample, timestep, words, txt_ids, img_ids, guidance = inputs
        told = self.when(waves(timestep.reshape(1), WIDTH)) + self.strength(waves(guidance, WIDTH))
        scale, shift = told[:, None].chunk(2, -1)
        x = torch.cat((self.read(words), self.see(sample)), 1)
        x = self.norm(x) * (1 + scale) + shift
        q, k, v = self.qkv(x).chunk(3, -1)
        places = torch.cat((txt_ids, img_ids), 0)  # [S, 3]
        angles = (places[:, :, None] * torch.tensor([1.0, 0.1])).flatten(1)  # [S, 6]
        q, k = (turned(y, angles) for y in (q, k))
        x = x + multi_head(q, k, v, 1)
        return (self.out(x[:, words.shape[1] :]),)


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Pairs of the first channels turned by angles [S, n], the others as they are."""
    pairs, rest = x[..., : 2 * 6], x[..., 2 * 6 :]
    first, second = torch.unflatten(pairs, -1, (6, 2)).select(-1, 0), torch.unflatten(pairs, -1, (6, 2)).select(-1, 1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2), rest), -1)


class Film(Model):
    """A convolution over frames and pixels, attention of each pixel over its frames, and to the words."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(4, WIDTH, 3, padding=1)
        self.when, self.read = nn.Linear(WIDTH, WIDTH), nn.Linear(TEXT, 2 * WIDTH)
        self.qkv, self.ask = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.last = nn.Conv3d(WIDTH, 4, (3, 1, 1), padding=(1, 0, 0))

    def denoise(self, *inputs: Tensor) -> tuple[Tensor]:
        sample, timestep, words = inputs
        x = self.first(sample) + self.when(waves(timestep.reshape(1), WIDTH))[:, :, None, None, None]
        y = x.permute(0, 3, 4, 2, 1)  # [B, h, w, F, C]
        q, k, v = self.qkv(y).flatten(0, 2).chunk(3, -1)
        y = y + torch.unflatten(multi_head(q, k, v, 2), 0, y.shape[:3])
        key, value = self.read(words).chunk(2, -1)
        asked = multi_head(self.ask(y).flatten(1, 3), key, value, 2)
        y = y + torch.unflatten(asked, 1, y.shape[1:4])
        return (self.last(y.permute(0, 4, 3, 1, 2)),)


FLOATS = (Port("timestep", ()), Port("encoder_hidden_states", (BATCH, WORDS, TEXT)))
PACKING = Interface(
    "transformer",
    (
        Port("sample", (BATCH, TOKENS, PACKED)), *FLOATS, Port("txt_ids", (WORDS, 3)), Port("img_ids", (TOKENS, 3)),
        Port("guidance", (BATCH,)),
    ),
    (Port("out_sample", (BATCH, TOKENS, PACKED)),),
)  # fmt: skip
FRAMES = tuple(Axis(name, 1, 2) for name in ("frames", "latent_height", "latent_width"))
FILMING = Interface(
    "transformer", (Port("sample", (BATCH, 4, *FRAMES)), *FLOATS), (Port("out_sample", (BATCH, 4, *FRAMES)),)
)


def normal(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def denoiser_of(engine: str, model: Model, interface: Interface, place: Path) -> Opened:
    """A model on an engine: as it is, or traced, written and opened again."""
    if engine == "eager":
        program = TorchProgram(model.denoise, model, interface.component, engine, interface, ())
        return Opened.of(Held(program, engine), None)
    session = opened(engine, place, trace(model, "denoise", interface), interface)
    return Opened(session, interface, NumpyArrays(), engine)


def looped(
    denoiser: Opened, table: Table, latents: NDArray[Any], told: Mapping[str, NDArray[Any]], guidance: Guidance
) -> NDArray[Any]:
    """The last latents of our loop."""
    put = denoiser.arrays.put
    conditions = {name: put(value) for name, value in told.items()}
    plan = Plan(table, put(latents), conditions, guidance, SeededNoise((0,) * len(latents)))
    (*_, last) = denoise(plan, denoiser)
    return np.asarray(last.latents)


@pytest.fixture(scope="module")
def packed() -> Model:
    return noisy(Packed(), 1)


@pytest.mark.parametrize("engine", ENGINES)
def test_packed_latents_with_places_and_distilled_guidance(packed: Model, tmp_path: Path, engine: str) -> None:
    """Flux's form: [B, h w / 4, 4 c], ids of rows and columns, a shift of the levels by size, guidance as an input."""
    denoiser = denoiser_of(engine, packed, PACKING, tmp_path)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for batch, height, width, words in ((2, 4, 6, 5), (1, 6, 10, 9)):
        latents = torch.from_numpy(normal(2, batch, PACKED // 4, height, width))
        tokens = FluxPipeline._pack_latents(latents, batch, PACKED // 4, height, width)
        ids = FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, latents.device, torch.float32)
        told: Arrays32 = {
            "encoder_hidden_states": normal(3, batch, words, TEXT), "txt_ids": np.zeros((words, 3), np.float32),
            "img_ids": ids.numpy(), "guidance": np.full(batch, 3.5, np.float32),
        }  # fmt: skip
        reference = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        reference.set_timesteps(STEPS, mu=0.7)
        x = tokens
        with torch.no_grad():
            for t in reference.timesteps:
                out = packed.denoise(x, t, *map(torch.from_numpy, told.values()))[0]
                x = reference.step(out, t, x, return_dict=False)[0]
        table = scheduler.table(STEPS, mu=0.7)
        found = looped(denoiser, table, tokens.numpy(), told, Guidance())
        assert relative(found, x.numpy()) <= BOUND
        for name, other in (("guidance", told["guidance"] + 0.1), ("img_ids", told["img_ids"][::-1].copy())):
            changed = looped(denoiser, table, tokens.numpy(), {**told, name: other}, Guidance())
            assert relative(changed, x.numpy()) > 100 * BOUND
    with pytest.raises(InputError, match=r"tokens is 1[56] here and 1[56] in another input"):
        looped(denoiser, table, tokens.numpy(), {**told, "img_ids": np.zeros((16, 3), np.float32)}, Guidance())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_film_is_a_sample_with_one_more_axis(tmp_path: Path, engine: str) -> None:
    film = noisy(Film(), 4)
    denoiser = denoiser_of(engine, film, FILMING, tmp_path)
    options: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    for frames, height, width, words in ((2, 3, 4, 5), (5, 4, 6, 9)):
        latents, text = normal(5, 2, 4, frames, height, width), normal(6, 4, words, TEXT)
        reference = diffusers.UniPCMultistepScheduler(**options)
        reference.set_timesteps(STEPS)
        x = torch.from_numpy(latents)
        with torch.no_grad():
            for t in reference.timesteps:
                less, more = film.denoise(torch.cat([x, x]), t.float(), torch.from_numpy(text))[0].chunk(2)
                x = reference.step(less + 4.0 * (more - less), t, x, return_dict=False)[0]
        table = UniPCMultistepScheduler(**options).table(STEPS)
        told = {"encoder_hidden_states": text}
        found = looped(denoiser, table, latents, told, Guidance((4.0,)))
        assert found.shape == latents.shape
        assert relative(found, x.numpy()) <= BOUND
        assert relative(looped(denoiser, table, latents, told, Guidance((4.1,))), x.numpy()) > 100 * BOUND


@dataclass(frozen=True)
class Experts:
    """Two denoisers as one: the first where there is much noise, the second from `boundary` (a timestep) on."""

    first: Denoiser
    second: Denoiser
    boundary: float

    @property
    def arrays(self) -> Arrays:
        return self.first.arrays

    @property
    def engine(self) -> str:
        return self.first.engine

    @property
    def shares(self) -> bool:
        return self.first.shares and self.second.shares

    def prepare(
        self, timesteps: Sequence[float], conditions: Mapping[str, Array], branches: int, refresh: Refresh | None = None
    ) -> Predict:
        first, second = (one.prepare(timesteps, conditions, branches, refresh) for one in (self.first, self.second))
        return lambda n, sample, added=NOTHING: (first if timesteps[n] >= self.boundary else second)(n, sample, added)


@pytest.fixture(scope="module")
def two_experts() -> Iterator[type[DiffusionPipeline]]:
    """A pipeline with two denoisers, declared like any other."""

    class TwoExpertsPipeline(StableDiffusionPipeline):
        SLOTS: ClassVar[Slots] = {**StableDiffusionPipeline.SLOTS, "unet_2": model("UNet2DConditionModel")}
        OPTIONS: ClassVar[Mapping[str, Any]] = {**StableDiffusionPipeline.OPTIONS, "boundary_ratio": None}

        def denoiser(self, slot: str | None = None, scale: float = 1.0) -> Denoiser:  # noqa: ARG002
            first, second = (super(TwoExpertsPipeline, self).denoiser(slot) for slot in ("unet", "unet_2"))
            return Experts(first, second, 1000 * self.options["boundary_ratio"])

    yield TwoExpertsPipeline
    DiffusionPipeline.registry.pop("TwoExpertsPipeline")


@pytest.fixture(scope="module")
def experts(two_experts: Any, sd2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Its checkpoint, and the second denoiser as diffusers has it."""
    folder = tmp_path_factory.mktemp("experts")
    plain: Any = StableDiffusionPipeline.from_pretrained(sd2, backend="eager")
    second = noisy(diffusers.UNet2DConditionModel.from_pretrained(sd2, subfolder="unet"), 99)
    second.save_pretrained(folder / "second")
    unet = UNet.from_pretrained(folder / "second")
    pipe = two_experts(**plain.components, unet_2=unet, boundary_ratio=0.5)
    pipe.save_pretrained(folder / "pipeline")
    return folder / "pipeline", second


def expected(sd2: Path, second: Any, call: Mapping[str, Any]) -> NDArray[Any]:
    """diffusers' pictures, its denoiser exchanged between two steps."""
    theirs: Any = diffusers.StableDiffusionPipeline.from_pretrained(sd2, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)

    def exchange(pipe: Any, step: int, _time: Any, _values: Any) -> dict[str, Any]:
        if step + 1 < len(pipe.scheduler.timesteps) and pipe.scheduler.timesteps[step + 1] < 500:
            pipe.unet = second
        return {}

    images: NDArray[Any] = theirs(
        **call, generator=torch.Generator().manual_seed(0), output_type="np", callback_on_step_end=exchange
    ).images
    return images


@pytest.mark.parametrize("engine", ENGINES)
def test_two_denoisers_are_two_components_of_one_pipeline(
    sd2: Path, two_experts: Any, experts: tuple[Path, Any], tmp_path: Path, engine: str
) -> None:
    folder, second = experts
    if engine != "eager":
        with one_process():
            export(folder, engine, tmp_path / "exported")
    pipe = two_experts.from_pretrained(folder if engine == "eager" else tmp_path / "exported", backend=engine)
    assert {"unet", "unet_2"} <= set(pipe.placement)
    call: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 4, "guidance_scale": 3.0}
    images = expected(sd2, second, call)
    assert np.abs(pipe(**call, seed=0, output_type="np").images - images).max() <= 1e-4
    first: Callable[..., Any] = StableDiffusionPipeline.from_pretrained(sd2, backend="eager")
    assert np.abs(first(**call, seed=0, output_type="np").images - images).max() > 1e-2
