"""Decoders that take the denoiser's latents and give bytes: the values and roundings of the plain path, everywhere."""

import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from checkpoints import VAE, noisy
from exported import FORMATS, export, once, shared_place
from numpy.typing import NDArray
from parity import relative
from PIL import Image
from test_models_autoencoders import TINY, VQ
from test_rewrites import native
from test_screening import screened

from anamorph import DiffusionPipeline
from anamorph.artifact import NATIVE
from anamorph.decoders import BYTES, PICTURES, SCALED
from anamorph.errors import ArtifactError, InputError, NumericalError
from anamorph.image import to_uint8
from anamorph.models import MODELS, picturing
from anamorph.rewrites import REWRITES, fitting

BOUND = 1e-5
"""Largest relative L2 difference of an exact rewrite (float32)."""
SHIFTED = {"latents_mean": (0.5, -1.0, 0.25, 2.0), "latents_std": (0.8, 1.5, 1.0, 0.6), "scaling_factor": 0.5}
AUTOENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "usual": ("AutoencoderKL", VAE),
    "shifted": ("AutoencoderKL", {**VAE, **SHIFTED}),
    "shifted, no 1x1": ("AutoencoderKL", {**VAE, **SHIFTED, "use_post_quant_conv": False}),
    "quantised": ("VQModel", VQ),
    "tiny": ("AutoencoderTiny", TINY),
}


def latents(channels: int = 4, count: int = 2, height: int = 5, width: int = 6) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((count, channels, height, width), np.float32)


def expected(theirs: Any, x: NDArray[np.float32]) -> NDArray[Any]:
    """What diffusers' pipelines decode scaled latents to."""
    z, config = torch.from_numpy(x), theirs.config
    if config.get("latents_mean") is not None:
        mean, deviation = (torch.tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
        z = z * deviation / config.scaling_factor + mean
    else:
        z = z / config.scaling_factor
    with torch.no_grad():
        pictures: NDArray[Any] = theirs.decode(z).sample.numpy()
    return pictures


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_scaled_latents_become_what_diffusers_decodes(name: str) -> None:
    kind, config = AUTOENCODERS[name]
    theirs = noisy(getattr(diffusers, kind)(**config), 1)
    model: Any = MODELS[kind].adopt(theirs, dict(theirs.config))
    x = latents(theirs.config.latent_channels)
    model.rewrite([BYTES])
    assert model.method("vae_decoder") == "pictures"
    with torch.no_grad():
        sample, pictures = (value.numpy() for value in model.pictures(torch.from_numpy(x)))
    exact = expected(theirs, x)
    assert relative(sample, exact) <= BOUND
    assert np.array_equal(pictures, to_uint8(sample))
    model.rewrite(())
    assert model.method("vae_decoder") == "pixels"


def test_a_shift_that_is_forgotten_would_be_seen() -> None:
    kind, config = AUTOENCODERS["shifted"]
    theirs = noisy(getattr(diffusers, kind)(**config), 1)
    model: Any = MODELS[kind].adopt(theirs, dict(theirs.config))
    scaling = picturing.Scaling(SHIFTED["scaling_factor"])
    with torch.no_grad():
        sample = model.drawn(torch.from_numpy(latents()), scaling).numpy()
    assert relative(sample, expected(theirs, latents())) > 1e-2


def test_bytes_are_rounded_as_elsewhere_at_every_half() -> None:
    halves = (np.arange(-4, 260) + 0.5) / 255 * 2 - 1
    values = np.concatenate([np.nextafter(halves, -9), halves, np.nextafter(halves, 9)]).astype(np.float32)
    pictures = values.reshape(2, 3, 4, -1)
    found = picturing.as_bytes(torch.from_numpy(pictures)).numpy()
    assert np.array_equal(found, to_uint8(pictures))
    assert not np.array_equal(
        (np.clip(pictures / 2 + 0.5, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(0, 2, 3, 1), found
    )


def load(folder: Path, **arguments: Any) -> Any:
    return DiffusionPipeline.from_pretrained(folder, **arguments)


@pytest.mark.parametrize("engine", ["eager", *FORMATS])
def test_engines_give_the_bytes_of_their_own_floats(sd2: Path, engine: str) -> None:
    pipe = load(native(sd2, engine)) if engine in FORMATS else load(sd2, backend=engine)
    plain = load(sd2, backend="eager", rewrites="none")
    assert BYTES in pipe.placement["vae_decoder"].details["rewrites"].split()
    program = pipe.program("vae_decoder")
    for count, height, width in ((2, 5, 6), (1, 1, 1), (3, 9, 4)):
        x = latents(4, count, height, width)
        found = program.session()({SCALED: program.arrays.put(x)})
        sample, pictures = (program.arrays.get(found[name]) for name in ("sample", PICTURES))
        assert np.array_equal(pictures, to_uint8(sample))
        floats = pipe.decode(x, "np")
        assert relative(floats, plain.decode(x, "np")) <= BOUND
        assert np.array_equal(np.stack([np.asarray(one) for one in pipe.decode(x)]), pictures)
        assert np.array_equal(np.rint(floats * np.float32(255)).astype(np.uint8), pictures)
        assert torch.equal(pipe.decode(x, "pt"), torch.from_numpy(floats).permute(0, 3, 1, 2))


def test_compiles_as_one_graph(sd2: Path) -> None:
    model: Any = MODELS["AutoencoderKL"].from_pretrained(sd2, subfolder="vae")
    model.rewrite([BYTES])
    torch._dynamo.reset()
    compiled = torch.compile(model.pictures, fullgraph=True, backend="eager", dynamic=False)
    with torch.no_grad():
        (sample, pictures), (exact, _) = (call(torch.from_numpy(latents())) for call in (compiled, model.pictures))
    assert torch.allclose(sample, exact, atol=1e-5)
    assert np.array_equal(pictures.numpy(), to_uint8(sample.numpy()))


@pytest.mark.parametrize("switch", ["slicing", "tiling"])
def test_pieces_are_joined_as_before(sd2: Path, switch: str) -> None:
    pipe, plain = load(sd2, backend="eager"), load(sd2, backend="eager", rewrites="none")
    x = latents(4, 2, 12, 20)
    for one in (pipe, plain):
        getattr(one, f"enable_vae_{switch}")()
    pictures = [np.stack([np.asarray(each, np.int16) for each in one.decode(x)]) for one in (pipe, plain)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert np.mean(pictures[0] != pictures[1]) < 1e-3


def test_pictures_that_are_held_back_are_black_and_others_the_same(sd2: Path) -> None:
    folder = once(shared_place() / "screened-bytes", lambda out: screened(sd2, out))
    call: dict[str, Any] = {"prompt": ["a red cat", "a dog", "a photo", "red"], "num_inference_steps": 2,
                            "seed": [1, 2, 3, 4]}  # fmt: skip
    pipe = load(folder, backend="eager")
    found = pipe(**call)
    assert found.nsfw_content_detected.count(True) == 2
    floats = pipe(**call, output_type="np")
    assert floats.nsfw_content_detected == found.nsfw_content_detected
    for image, values in zip(found.images, floats.images, strict=True):
        assert np.array_equal(np.asarray(image), np.rint(values * np.float32(255)).astype(np.uint8))


def test_a_pipeline_that_knows_another_scale_is_heard(sd2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, plain = load(sd2, backend="eager"), load(sd2, backend="eager", rewrites="none")
    other = picturing.Scaling(0.5)
    monkeypatch.setattr(type(pipe), "scaling", property(lambda _: other))
    found, exact = (one.decode(latents(), "np") for one in (pipe, plain))
    assert relative(found, exact) <= BOUND
    monkeypatch.undo()
    assert relative(pipe.decode(latents(), "np"), exact) > 1e-2


def test_nan_is_found_before_it_becomes_a_byte(sd2: Path) -> None:
    x = latents()
    x[1, 0, 0, 0] = np.nan
    with pytest.raises(NumericalError, match="vae_decoder returned NaN or infinity at decoding the latents"):
        load(sd2, backend="eager").decode(x)


def test_a_certificate_sees_bytes_that_are_off(sd2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exported._traces", {})
    plain = picturing.as_bytes
    darker = lambda pictures: plain(0.9 * pictures if torch.compiler.is_exporting() else pictures)  # noqa: E731
    monkeypatch.setattr(picturing, "as_bytes", darker)
    with pytest.raises(ArtifactError, match=r"vae_decoder \(pictures .*differs from PyTorch"):
        export(sd2, "onnxruntime", tmp_path / "out", signature=NATIVE)


def test_preconditions(sd2: Path, tmp_path: Path) -> None:
    unmet = REWRITES[BYTES].unmet
    for part in ("vae", "vae_decoder"):
        assert unmet(part, "AutoencoderKL", {"out_channels": 3}) is None
        assert unmet(part, "AutoencoderKL", {"out_channels": 2}) is not None
    assert fitting([BYTES], "vae_encoder", "AutoencoderKL", {"out_channels": 3}) == ()
    assert unmet("unet", "UNet2DConditionModel", {"out_channels": 4}) is not None
    folder = Path(shutil.copytree(sd2, tmp_path / "model"))
    noisy(diffusers.AutoencoderKL(**{**VAE, "out_channels": 2}), 1).save_pretrained(folder / "vae")
    with pytest.raises(InputError, match="neither grey, RGB nor RGBA"):
        load(folder, backend="eager", rewrites=BYTES)


def test_grey_pictures_have_one_channel(sd2: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sd2, tmp_path / "model"))
    noisy(diffusers.AutoencoderKL(**{**VAE, "out_channels": 1}), 1).save_pretrained(folder / "vae")
    (image, _) = load(folder, backend="eager").decode(latents())
    assert isinstance(image, Image.Image)
    assert (image.mode, image.size) == ("L", (12, 10))
