"""What a pipeline takes, gives and refuses; engines that compute nothing stand in where weights do not matter."""

import functools
import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import relative
from PIL import Image
from torch import Tensor

import anamorph
from anamorph import DiffusionPipeline, StableDiffusionPipeline
from anamorph.backends.compile import MOST, ShapeSpecialised
from anamorph.backends.gaussian import DEVIATION, MEAN, cumulative_alphas
from anamorph.engine import Placement, Target
from anamorph.errors import BackendError, InputError, NumericalError
from anamorph.interface import Axis, Interface, Port
from anamorph.machine import is_zen

NOTHING = {"default": "null"}


@pytest.fixture(scope="module")
def null(sd1: Path) -> StableDiffusionPipeline:
    """A pipeline whose components compute zeros."""
    return StableDiffusionPipeline.from_pretrained(sd1, backend=NOTHING)


@pytest.fixture(scope="module")
def eager(sd1: Path) -> StableDiffusionPipeline:
    """The random checkpoint through PyTorch."""
    return StableDiffusionPipeline.from_pretrained(sd1, backend="eager")


def test_the_class_is_the_one_that_the_index_names(sd1: Path) -> None:
    assert type(DiffusionPipeline.from_pretrained(sd1, backend="null")) is StableDiffusionPipeline


def test_output_types_hold_the_same_picture(eager: StableDiffusionPipeline) -> None:
    call: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 2, "seed": 5}
    pil = eager(**call).images
    array = eager(**call, output_type="np").images
    tensor = eager(**call, output_type="pt").images
    latent = eager(**call, output_type="latent").images
    assert isinstance(pil[0], Image.Image)
    assert array.shape == (1, 64, 64, 3)
    assert np.abs(np.asarray(pil[0]) / 255 - array[0]).max() <= 0.5 / 255 + 1e-6
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert np.array_equal(eager.decode(latent, "np"), array)
    assert eager(**call, return_dict=False)[1] is None


def test_a_picture_does_not_depend_on_its_batch_mates(eager: StableDiffusionPipeline) -> None:
    together = eager(["a cat", "a dog", "red"], num_inference_steps=3, seed=[7, 1, 9], output_type="np").images
    alone = eager("a dog", num_inference_steps=3, seed=1, output_type="np").images
    assert np.abs(together[1] - alone[0]).max() <= 1e-5
    assert np.abs(together[1] - together[0]).max() > 0.01


def test_one_seed_counts_up_from_picture_to_picture(eager: StableDiffusionPipeline) -> None:
    counted = eager("a cat", num_inference_steps=2, seed=4, num_images_per_prompt=2, output_type="np").images
    listed = eager("a cat", num_inference_steps=2, seed=[4, 5], num_images_per_prompt=2, output_type="np").images
    assert np.array_equal(counted, listed)


def test_a_seed_draws_what_a_torch_generator_draws(eager: StableDiffusionPipeline) -> None:
    generator = torch.Generator().manual_seed(11)
    ours = eager("a cat", num_inference_steps=3, seed=11, output_type="np").images
    theirs = eager("a cat", num_inference_steps=3, generator=generator, output_type="np").images
    assert np.abs(ours - theirs).max() <= 1e-5


def test_given_latents_and_embeddings_take_the_place_of_seed_and_prompt(eager: StableDiffusionPipeline) -> None:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    embeds = eager.encode(["a cat"])
    negative = eager.encode(["blue"])
    words = eager("a cat", negative_prompt="blue", num_inference_steps=3, seed=2, output_type="np").images
    given = eager(
        prompt_embeds=torch.from_numpy(embeds),
        negative_prompt_embeds=negative,
        latents=noise,
        num_inference_steps=3,
        output_type="np",
    ).images
    assert np.abs(words - given).max() <= 1e-5


def test_a_callback_sees_every_step_and_may_replace_the_latents(eager: StableDiffusionPipeline) -> None:
    seen: list[tuple[int, float]] = []

    def halve(pipe: StableDiffusionPipeline, step: int, timestep: float, values: dict[str, Any]) -> dict[str, Any]:
        assert pipe is eager
        seen.append((step, timestep))
        return {"latents": values["latents"] * 0.5} if step == 2 else {}

    call: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 3, "seed": 1, "output_type": "latent"}
    plain = eager(**call).images
    halved = eager(**call, callback_on_step_end=halve).images
    assert [step for step, _ in seen] == [0, 1, 2]
    assert [timestep for _, timestep in seen] == list(eager.scheduler.table(3).timesteps)
    assert torch.equal(halved, plain * 0.5)


def test_a_callback_that_returns_something_unknown_is_an_error(null: StableDiffusionPipeline) -> None:
    with pytest.raises(InputError, match="latent_typo"):
        null("x", num_inference_steps=1, callback_on_step_end=lambda *_: {"latent_typo": 1})


def test_steps_stop_when_they_are_closed(null: StableDiffusionPipeline) -> None:
    states = null.steps("a cat", num_inference_steps=5, seed=0)
    first = next(states)
    assert (first.index, first.total) == (0, 5)
    states.close()
    assert list(states) == []


def test_the_exact_denoiser_leads_to_the_exact_solution_with_order_one(sd1: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(sd1, backend={"unet": "gaussian", "default": "null"})
    noise = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    alphas = cumulative_alphas()

    def error(steps: int) -> float:
        # The probability-flow solution for Gaussian data: (x - a m) / sqrt(a^2 d^2 + s^2) stays constant, from the
        # level of the first timestep down to the one below the first training step.
        call: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 1, "output_type": "latent"}
        final = pipe("x", latents=noise, **call).images
        first, last = alphas[int(pipe.scheduler.table(steps).timesteps[0])], alphas[0]
        scale = (noise - first**0.5 * MEAN) / (first * DEVIATION**2 + 1 - first) ** 0.5
        return relative(final, last**0.5 * MEAN + scale * (last * DEVIATION**2 + 1 - last) ** 0.5)

    coarse, fine = error(100), error(200)
    assert fine < 0.02
    assert 1.8 < coarse / fine < 2.2


def test_two_threads_generate_what_one_does(eager: StableDiffusionPipeline) -> None:
    call: dict[str, Any] = {"num_inference_steps": 4, "output_type": "np"}
    expected = [eager("a cat", seed=seed, **call).images for seed in (1, 2)]
    results: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: results.update({seed: eager("a cat", seed=seed, **call).images}))
        for seed in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(results[1], expected[0])
    assert np.array_equal(results[2], expected[1])


def test_engines_mix_per_component(sd2: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(sd2, backend={"unet": "compile", "vae": "eager"})
    assert {part: placed.engine for part, placed in pipe.placement.items()} == {
        "text_encoder": "eager",
        "unet": "compile",
        "unet_prepare": "compile",
        "vae_decoder": "eager",
    }


def test_each_shape_is_compiled_once_and_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="anamorph.backends.compile")
    ports = Port("x", (Axis("width"),)), Port("y", (Axis("width"),))
    double = ShapeSpecialised(lambda x: (2 * x,), Interface("unet", ports[:1], ports[1:]))
    for size in (2, 3, 2):
        assert torch.equal(double(torch.ones(size))[0], torch.full((size,), 2.0))
    assert caplog.messages == ["compiling unet for width 2", "compiling unet for width 3"]
    assert double.buckets.history == [
        "width 2: compiled, for this size alone, the first that was called",
        "width 3: compiled, for this size alone, at its first call",
    ]


def test_the_shape_that_was_not_called_for_longest_leaves_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, weakref.ref[Any]]] = []

    class Code:
        def __init__(self, graph: Any) -> None:
            self.graph = graph

        def __call__(self, *values: Any) -> Any:
            return self.graph.forward(*values)

    def compiler(graph: Any, inputs: list[Tensor]) -> Any:
        code = Code(graph)
        made.append((len(inputs[0]), weakref.ref(code)))
        return code

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compiler))
    ports = Port("x", (Axis("width"),)), Port("y", (Axis("width"),))
    double = ShapeSpecialised(lambda x: (2 * x,), Interface("unet", ports[:1], ports[1:]))
    for size in [*range(1, MOST + 1), 1, MOST + 1, 1, 2]:
        assert torch.equal(double(torch.ones(size))[0], torch.full((size,), 2.0))
    assert [size for size, _ in made] == [*range(1, MOST + 2), 2]  # 2 was given up for the ninth, 1 was not
    gc.collect()
    assert [size for size, code in made if code() is None] == [2, 3]


def test_bfloat16_is_close_to_float32_and_read_back(sd1: Path, eager: StableDiffusionPipeline) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(sd1, backend="eager", torch_dtype=torch.bfloat16)
    assert {placed.precision for placed in pipe.placement.values()} == {"bfloat16"}
    call: dict[str, Any] = {"num_inference_steps": 4, "seed": 3, "output_type": "latent", "guidance_scale": 2.0}
    error = relative(pipe("a cat", **call).images.numpy(), eager("a cat", **call).images.numpy())
    assert 1e-4 < error < 0.1


def test_placement_reports_what_runs(eager: StableDiffusionPipeline) -> None:
    products = "onednn-linear " if is_zen() else ""
    rewrites = {"rewrites": f"phase-convolutions {products}keys-once times-once prefix-sharing"}
    assert eager.placement["unet"] == Placement("unet", "eager", "cpu", "float32", rewrites)
    assert "unet: eager on cpu in float32" in repr(eager)


def test_components_of_one_pipeline_make_another_without_new_weights(eager: StableDiffusionPipeline) -> None:
    other = StableDiffusionPipeline(**eager.components)
    assert other.components["unet"] is eager.components["unet"]
    call: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 2, "seed": 0, "output_type": "np"}
    assert np.array_equal(other(**call).images, eager(**call).images)


def test_models_load_alone_and_run_in_a_loop_by_hand(sd1: Path, eager: StableDiffusionPipeline) -> None:
    unet = anamorph.UNet2DConditionModel.from_pretrained(sd1, subfolder="unet")
    vae = anamorph.AutoencoderKL.from_pretrained(sd1, subfolder="vae")
    scheduler = anamorph.DDIMScheduler.from_pretrained(sd1, subfolder="scheduler")
    scheduler.set_timesteps(3)
    text = torch.from_numpy(np.concatenate([eager.encode([""]), eager.encode(["a cat"])]))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(6)) * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            pair = scheduler.scale_model_input(torch.cat([latents] * 2), t)
            without, with_text = unet(pair, t, encoder_hidden_states=text).sample.chunk(2)
            latents = scheduler.step(without + 5.0 * (with_text - without), t, latents).prev_sample
        image = vae.decode(latents / vae.config.scaling_factor).sample
    expected = eager("a cat", num_inference_steps=3, guidance_scale=5.0, seed=6, output_type="np").images
    assert np.abs((image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() - expected).max() <= 1e-5


def test_saving_keeps_the_picture_and_diffusers_reads_it(tmp_path: Path, sd2: Path) -> None:
    import diffusers
    from safetensors import safe_open

    pipe = StableDiffusionPipeline.from_pretrained(sd2, backend="eager")
    pipe.save_pretrained(tmp_path)
    with safe_open(tmp_path / "text_encoder" / "model.safetensors", framework="pt") as file:
        assert all(name.startswith("text_model.") for name in file.keys())  # noqa: SIM118
    call: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 3, "output_type": "np"}
    before = pipe(**call, seed=1).images
    again = StableDiffusionPipeline.from_pretrained(tmp_path, backend="eager")
    assert np.array_equal(again(**call, seed=1).images, before)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    assert np.abs(theirs(**call, generator=torch.Generator().manual_seed(1)).images - before).max() <= 1e-4


def test_nan_names_component_and_step(sd1: Path) -> None:
    unet = anamorph.UNet2DConditionModel.from_pretrained(sd1, subfolder="unet")
    calls = 0
    plain = unet.denoise

    def break_third(*values: Any) -> Any:
        nonlocal calls
        calls += 1
        (out,) = plain(*values)
        return (out * float("nan") if calls == 3 else out,)

    unet.denoise = break_third  # type: ignore[method-assign]
    pipe = StableDiffusionPipeline.from_pretrained(sd1, backend="eager", unet=unet)
    with pytest.raises(NumericalError, match=r"unet returned NaN or infinity at step 3 of 5"):
        pipe("a cat", num_inference_steps=5)


def test_nan_in_the_text_encoder_is_named(sd1: Path) -> None:
    encoder = anamorph.CLIPTextModel.from_pretrained(sd1, subfolder="text_encoder")
    with torch.no_grad():
        next(encoder.parameters()).fill_(float("inf"))
    pipe = StableDiffusionPipeline.from_pretrained(sd1, backend="eager", text_encoder=encoder)
    with pytest.raises(NumericalError, match=r"text_encoder returned NaN or infinity at encoding the prompts"):
        pipe("a cat", num_inference_steps=1)


def test_a_long_prompt_is_cut_with_a_warning_that_shows_what_was_lost(null: StableDiffusionPipeline) -> None:
    with pytest.warns(UserWarning, match="cut off.*zebra"):
        null(" ".join(["cat"] * 80) + " zebra", num_inference_steps=1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": None}, "either prompt or prompt_embeds"),
        ({"prompt": ["a", 3]}, "prompt holds a int"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, "2 prompts and 1 negative"),
        ({"prompt": ["a", "b"], "seed": [1]}, "1 seeds for 2 pictures"),
        ({"prompt": "a", "seed": -1}, "seed -1"),
        ({"prompt": "a", "height": 65}, "height is 65, expected a positive multiple of 8"),
        ({"prompt": "a", "width": 0}, "width is 0"),
        ({"prompt": "a", "width": 1 << 20}, "at most"),
        ({"prompt": "a", "num_inference_steps": 0}, "steps"),
        ({"prompt": "a", "guidance_scale": float("nan")}, "guidance_scale"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"prompt": "a", "eta": 0.5, "scheduler": "EulerDiscreteScheduler"}, "eta"),
        ({"prompt": "a", "output_type": "jpeg"}, "output_type is 'jpeg'"),
        ({"prompt": "a", "latents": np.zeros((1, 4, 4, 8))}, r"latents have shape \[1, 4, 4, 8\]"),
        ({"prompt": "a", "seed": 1, "generator": torch.Generator()}, "either seed or generator"),
        ({"prompt": "a", "generator": [torch.Generator()] * 2}, "generator"),
        ({"prompt_embeds": np.zeros((1, 77, 5))}, "prompt_embeds has shape"),
        ({"prompt": "a", "callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
    ],
)
def test_wrong_arguments_are_named(sd1: Path, call: dict[str, Any], words: str) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(sd1, backend="null")
    if name := call.pop("scheduler", None):
        pipe.scheduler = getattr(anamorph, name).from_config(pipe.scheduler.config)
    with pytest.raises(InputError, match=words):
        pipe(**call)


def test_an_unknown_argument_is_an_error(null: StableDiffusionPipeline) -> None:
    with pytest.raises(TypeError, match="guidance_scal"):
        null("x", guidance_scal=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="guidance_scal"):
        null.steps("x", guidance_scal=3)  # type: ignore[call-arg]


def test_devices_and_precisions_that_are_not_there_are_errors(sd1: Path) -> None:
    with pytest.raises(BackendError, match="no device 'cuda:7'"):
        StableDiffusionPipeline.from_pretrained(sd1, backend="eager", device="cuda:7")
    with pytest.raises(BackendError, match="does not run in float16 on cpu"):
        StableDiffusionPipeline.from_pretrained(sd1, backend="eager", device="cpu", torch_dtype="fp16")
    with pytest.raises(InputError, match="precision 'int3' is unknown"):
        StableDiffusionPipeline.from_pretrained(sd1, backend="eager", torch_dtype="int3")
    with pytest.raises(InputError, match="backend names unett"):
        StableDiffusionPipeline.from_pretrained(sd1, backend={"unett": "eager"})
    with pytest.raises(InputError, match="'vaee'"):
        StableDiffusionPipeline.from_pretrained(sd1, vaee=None)


def test_a_target_is_a_value() -> None:
    assert Target() == Target("cpu", "float32")
