"""Adapters in every layout: what is read is what was written, layer by layer."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from adapters import drawn, theirs
from parity import IMAGE_BOUND
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from anamorph import DiffusionPipeline
from anamorph.errors import BackendError, CheckpointError, InputError
from anamorph.lora.adapting import adapting_of
from anamorph.lora.factors import added
from anamorph.lora.names import spelled

ALPHA, RANK = 6.0, 3
Layers = Mapping[str, tuple[Tensor, Tensor]]
"""Layer -> down and up."""
Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
CONV = "up_blocks.1.resnets.0.conv1"
HALF = "down_blocks.0.downsamplers.0.conv"
SHAPES = {Q: (32, 32), OUT: (64, 64), CONV: (64, 128, 3, 3), HALF: (32, 32, 3, 3)}
WORDS = {"encoder.layers.1.self_attn.k_proj": (32, 32), "encoder.layers.0.mlp.fc1": (48, 32)}


@pytest.fixture(scope="module")
def pipe(sd1: Path) -> Any:
    return DiffusionPipeline.from_pretrained(sd1, backend="eager")


def made(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Random factors for weights of these shapes."""
    random = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=random) * 0.2

    return {
        layer: (draw(RANK, *taken), draw(out, RANK, *[1] * (len(taken) - 1))) for layer, (out, *taken) in shapes.items()
    }


def dense(down: Tensor, up: Tensor, scale: float = ALPHA / RANK) -> Tensor:
    """What they add to the weight."""
    return scale * (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])


def read(pipe: Any, source: Any, component: str = "unet", **how: Any) -> dict[str, Any]:
    """Layer -> what the loaded adapter adds to its weight."""
    pipe.unload_lora_weights()
    pipe.load_lora_weights(source, "read", **how)
    adapting = adapting_of(pipe._models[component])
    assert adapting is not None
    return {
        layer: added(np.zeros((len(one.up), *one.down.shape[1:])), one) for layer, one in adapting.known["read"].items()
    }


def same(found: Mapping[str, Any], expected: Mapping[str, Tensor], bound: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for layer, value in expected.items():
        assert np.abs(found[layer] - value.numpy()).max() <= bound * value.abs().max().item()


def under(layer: str) -> str:
    return layer.replace(".", "_")


def kohya(layers: Layers, prefix: str = "lora_unet_") -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for layer, (down, up) in layers.items():
        name = prefix + under(layer)
        found |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(ALPHA)}
    return found


def scaled(layers: Layers, name: Callable[[str], tuple[str, str]]) -> dict[str, Tensor]:
    """A layout without alpha: that is in the up factor."""
    return {key: value for layer, (down, up) in layers.items()
            for key, value in zip(name(layer), (down, up * ALPHA / RANK), strict=True)}  # fmt: skip


def ending(prefix: str, down: str, up: str) -> Callable[[str], tuple[str, str]]:
    return lambda layer: (f"{prefix}{layer}{down}", f"{prefix}{layer}{up}")


def processors(layer: str) -> tuple[str, str]:
    place, _, last = layer.removesuffix(".0").rpartition(".")
    return f"{place}.processor.{last}_lora.down.weight", f"{place}.processor.{last}_lora.up.weight"


FORMS: dict[str, Callable[[Layers], dict[str, Tensor]]] = {
    "diffusers": lambda layers: scaled(layers, ending("unet.", ".lora_A.weight", ".lora_B.weight")),
    "diffusers 0.20": lambda layers: scaled(layers, ending("unet.", ".lora.down.weight", ".lora.up.weight")),
    "kohya": kohya,
}


@pytest.mark.parametrize("form", FORMS)
def test_a_unets_factors_are_read(pipe: Any, form: str) -> None:
    layers = made(SHAPES)
    same(read(pipe, FORMS[form](layers)), {layer: dense(*pair) for layer, pair in layers.items()})


def test_attention_processors_of_the_first_versions_are_read(pipe: Any) -> None:
    layers = made({Q: SHAPES[Q], OUT: SHAPES[OUT]})
    same(read(pipe, scaled(layers, processors)), {layer: dense(*pair) for layer, pair in layers.items()})


@pytest.mark.parametrize("prefix", ["lora_te_text_model_", "lora_te1_text_model_"])
def test_a_text_encoders_factors_are_read(pipe: Any, prefix: str) -> None:
    layers = made(WORDS)
    same(read(pipe, kohya(layers, prefix), "text_encoder"), {layer: dense(*pair) for layer, pair in layers.items()})
    old = scaled({layer: pair for layer, pair in layers.items() if "attn" in layer},
                 lambda layer: tuple(f"text_encoder.text_model.{layer.replace('k_proj', 'to_k')}_lora.{way}.weight"
                                     for way in ("down", "up")))  # type: ignore[arg-type, return-value]  # fmt: skip
    (layer,) = (layer for layer in layers if "attn" in layer)
    same(read(pipe, old, "text_encoder"), {layer: dense(*layers[layer])})


def test_the_names_of_the_original_model_are_those_that_diffusers_reads(sdxl: Path) -> None:
    layers = {
        name: tuple(module.weight.shape)
        for name, module in diffusers.UNet2DConditionModel.from_pretrained(sdxl / "unet").named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and "block" in name
    }
    config = diffusers.UNet2DConditionModel.load_config(sdxl / "unet")
    originals = {
        way: layer for way, layer in spelled(layers, config).items() if way.startswith(("input_", "output_", "middle_"))
    }
    assert len(set(originals.values())) == len(layers)
    file = {f"lora_unet_{way}.{end}.weight": torch.full((2, 2), float(number))
            for number, way in enumerate(originals) for end in ("lora_down", "lora_up")}  # fmt: skip
    converted, _ = diffusers.StableDiffusionXLPipeline.lora_state_dict(
        file, unet_config=diffusers.UNet2DConditionModel.from_config(config).config
    )
    numbers = {int(value[0, 0]): name for name, value in converted.items() if "down" in name.rsplit(".", 2)[1]}
    for number, (way, layer) in enumerate(originals.items()):
        name = numbers[number].removeprefix("unet.").replace(".processor", "").split("_lora.down")[0].split(".lora.")[0]
        assert {name, f"{name}.0"} & {layer}, way


def peft_folder(folder: Path, layers: Layers, **config: Any) -> Path:
    """What PEFT writes."""
    folder.mkdir()
    names = {f"base_model.model.{layer}.lora_{end}.weight": value.contiguous()
             for layer, pair in layers.items() for end, value in zip("AB", pair, strict=True)}  # fmt: skip
    save_file(names, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, **config}))
    return folder


def test_folders_of_peft_are_read_with_their_scales(pipe: Any, tmp_path: Path) -> None:
    layers = made(SHAPES)
    expected = {layer: dense(*pair) for layer, pair in layers.items()}
    same(read(pipe, peft_folder(tmp_path / "a", layers, lora_alpha=ALPHA)), expected)
    root = {layer: value * RANK / RANK**0.5 for layer, value in expected.items()}
    same(read(pipe, peft_folder(tmp_path / "b", layers, lora_alpha=ALPHA, use_rslora=True)), root)
    own = {**expected, Q: dense(*layers[Q], 9 / RANK)}
    same(read(pipe, peft_folder(tmp_path / "c", layers, lora_alpha=ALPHA, alpha_pattern={"attn1.to_q": 9})), own)
    words = made(WORDS)
    folder = peft_folder(tmp_path / "d", {f"text_model.{k}": pair for k, pair in words.items()}, lora_alpha=ALPHA)
    same(read(pipe, folder, "text_encoder"), {layer: dense(*pair) for layer, pair in words.items()})
    folder = peft_folder(tmp_path / "e", layers, use_dora=True)
    with pytest.raises(CheckpointError, match="says use_dora, which is not served"):
        pipe.load_lora_weights(folder)


def test_diffusers_metadata_says_the_scale(pipe: Any, tmp_path: Path) -> None:
    layers, file = made(SHAPES), tmp_path / "any name.safetensors"
    tensors = {f"unet.{layer}.lora_{end}.weight": value.contiguous()
               for layer, pair in layers.items() for end, value in zip("AB", pair, strict=True)}  # fmt: skip
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps({"unet.r": RANK, "unet.lora_alpha": ALPHA})})
    same(read(pipe, tmp_path), {layer: dense(*pair) for layer, pair in layers.items()})
    save_file(tensors, file, {"lora_adapter_metadata": "[1"})
    with pytest.raises(CheckpointError, match="damaged metadata lora_adapter_metadata"):
        pipe.load_lora_weights(file)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types_and_pickles_are_read(pipe: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    layers = {layer: (down.to(dtype), up.to(dtype)) for layer, (down, up) in made(SHAPES).items()}
    expected = {layer: dense(down.float(), up.float()) for layer, (down, up) in layers.items()}
    tensors = kohya(layers)
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "b.bin")
    for file in ("a.safetensors", "b.bin"):
        same(read(pipe, tmp_path, weight_name=file), expected)


def test_a_core_between_the_factors_is_multiplied_in(pipe: Any) -> None:
    """LoCon's three convolutions, one after another, are one with the taps of the core."""
    random = torch.Generator().manual_seed(3)
    down, mid, up = (torch.randn(sizes, generator=random) for sizes in ((RANK, 128, 1, 1), (RANK, RANK, 3, 3),
                                                                        (64, RANK, 1, 1)))  # fmt: skip
    name = "lora_unet_" + under(CONV)
    found = read(pipe, {f"{name}.lora_down.weight": down, f"{name}.lora_mid.weight": mid, f"{name}.lora_up.weight": up})
    x = torch.randn(1, 128, 6, 5, generator=random)
    expected = F.conv2d(F.conv2d(F.conv2d(x, down), mid, padding=1), up)
    assert torch.allclose(F.conv2d(x, torch.from_numpy(found[CONV]), padding=1), expected, atol=1e-3)


def hadamard(layer: str, shape: tuple[int, ...], seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """LoHa's four factors, and what they add."""
    random = torch.Generator().manual_seed(seed)
    inner = int(np.prod(shape[1:]))
    u1, u2 = (torch.randn(shape[0], RANK, generator=random) * 0.3 for _ in range(2))
    d1, d2 = (torch.randn(RANK, inner, generator=random) * 0.3 for _ in range(2))
    name = "lora_unet_" + under(layer)
    names = {"hada_w1_a": u1, "hada_w1_b": d1, "hada_w2_a": u2, "hada_w2_b": d2, "alpha": torch.tensor(ALPHA)}
    change = ALPHA / RANK * ((u1 @ d1) * (u2 @ d2)).reshape(shape)
    return {f"{name}.{key}": value for key, value in names.items()}, change


def test_loha_is_exact_hot_and_fused(sd1: Path, pipe: Any) -> None:
    parts = {layer: hadamard(layer, shape, seed) for seed, (layer, shape) in enumerate(SHAPES.items())}
    tensors = {name: value for names, _ in parts.values() for name, value in names.items()}
    same(read(pipe, tensors), {layer: change for layer, (_, change) in parts.items()}, 1e-5)
    reference = theirs(sd1)
    for layer, (_, change) in parts.items():
        reference.unet.get_submodule(layer).weight.data += change
    expected = drawn(reference)
    assert np.abs(drawn(pipe) - expected).max() <= IMAGE_BOUND
    pipe.fuse_lora()
    assert np.abs(drawn(pipe) - expected).max() <= IMAGE_BOUND
    pipe.unfuse_lora()
    pipe.disable_lora()
    assert np.abs(drawn(pipe) - expected).max() > 10 * IMAGE_BOUND
    pipe.enable_lora()


REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Any]], str]] = {
    "another model": (lambda t: {**t, "lora_unet_down_blocks_9_attentions_0_proj_in.lora_down.weight": torch.ones(2, 2),
                                 "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(2, 2)},
                      "2 of its 14 tensors belong to no layer of unet, text_encoder: lora_unet_down_blocks_9_att"),
    "strange role": (lambda t: {**t, f"lora_unet_{under(Q)}.lora_sideways.weight": torch.ones(2)}, "lora_sideways"),
    "nothing": (lambda _: {}, "it holds no tensors"),
    "no partner": (lambda t: {k: v for k, v in t.items() if not k.endswith("to_q.lora_up.weight")}, "'up' is missing"),
    "rank": (lambda t: {**t, f"lora_unet_{under(Q)}.lora_up.weight": torch.ones(32, 5)},
             r"factors \[3, 32\] and \[32, 5\] do not make a weight \[32, 32\]"),
    "width": (lambda t: {**t, f"lora_unet_{under(Q)}.lora_down.weight": torch.ones(3, 40)}, r"factors \[3, 40\]"),
    "nan": (lambda t: {**t, f"lora_unet_{under(Q)}.lora_up.weight": torch.full((32, 3), torch.nan)},
            "does not fit down_blocks.0.* of unet: its factor 'up' holds NaN"),
    "dora": (lambda t: {**t, f"lora_unet_{under(Q)}.dora_scale": torch.ones(32, 1)}, r"another kind \(DoRA\)"),
    "lokr": (lambda t: {**t, f"lora_unet_{under(Q)}.lokr_w1": torch.ones(4, 4)}, r"another kind \(LoKr\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(pipe: Any, case: str) -> None:
    pipe.unload_lora_weights()
    change, match = REFUSED[case]
    with pytest.raises(InputError, match=match):
        pipe.load_lora_weights(change(kohya(made(SHAPES))))
    assert pipe.get_list_adapters() == {}


class Trap:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.place,)


def test_files_and_names_that_are_none_are_refused(pipe: Any, sd1: Path, tmp_path: Path) -> None:
    pipe.unload_lora_weights()
    torch.save({"lora_unet_x.alpha": Trap(tmp_path / "ran")}, tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(CheckpointError, match="cannot be loaded as plain weights"):
        pipe.load_lora_weights(tmp_path)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(CheckpointError, match=r"has no other\.safetensors; name the file with weight_name="):
        pipe.load_lora_weights(tmp_path, weight_name="other.safetensors")
    with pytest.raises(InputError, match="a file, a folder, a hub id or tensors by name, got a int"):
        pipe.load_lora_weights(3)
    adapter = kohya(made(SHAPES))
    pipe.load_lora_weights(adapter, "one")
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("an adapter 'one' is loaded already", lambda: pipe.load_lora_weights(adapter, "one")),
        ("there is no adapter 'two' to replace", lambda: pipe.load_lora_weights(adapter, "two", hotswap=True)),
        ("expected a name without dots", lambda: pipe.load_lora_weights(adapter, "a.b")),
        ("there is no adapter 'two'; loaded are one", lambda: pipe.set_adapters(["one", "two"])),
        ("there are 1 adapters and 2 weights", lambda: pipe.set_adapters("one", [1.0, 2.0])),
        ("an adapter's weight is 'much'", lambda: pipe.set_adapters("one", "much")),
        ("weights name 'vae', expected unet, text_encoder", lambda: pipe.set_adapters("one", {"vae": 1})),
        ("weights of blocks name 'left'", lambda: pipe.set_adapters("one", {"unet": {"left": 1}})),
        ("there are 3 weights for the 1 transformers of down.block_0",
         lambda: pipe.set_adapters("one", {"unet": {"down": {"block_0": [1, 2, 3]}}})),
        ("up.block_0, which has no transformers",
         lambda: pipe.set_adapters("one", {"unet": {"up": {"block_0": 1}}})),
        ("adapters do not change 'vae'", lambda: pipe.fuse_lora(components=["vae"])),
        ("there is no adapter to fuse", lambda: pipe.fuse_lora(components=["text_encoder"])),
        ("there is no adapter 'two'", lambda: pipe.delete_adapters("two")),
    ]  # fmt: skip
    for match, call in calls:
        with pytest.raises(InputError, match=match):
            call()
    assert pipe.get_active_adapters() == ["one"]
    null: Any = DiffusionPipeline.from_pretrained(sd1, backend="null")
    with pytest.raises(BackendError, match="runs on null, which takes no adapters"):
        null.load_lora_weights(adapter)
