"""The hub's cache with tiny checkpoints under the ids that the snippets name, and pictures for their addresses."""

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from anamorph.drafts import drafted
from anamorph.errors import InputError

COMMIT = "0" * 40
RECIPES: Mapping[str, tuple[str, ...]] = {
    "stable_diffusion": (
        "stable-diffusion-v1-5/stable-diffusion-v1-5", "CompVis/stable-diffusion-v1-4", "nitrosocke/Ghibli-Diffusion",
        "andite/anything-v4.0",
    ),
    "inpainting": ("runwayml/stable-diffusion-inpainting",),
    "with_learned_word": ("sayakpaul/textual-inversion-cat-kerascv_sd_diffusers_pipeline",),
    "depth": ("stabilityai/stable-diffusion-2-depth",),
    "autoencoder": ("stabilityai/sd-vae-ft-mse",),
    "first_unconditional": ("google/ddpm-cat-256", "google/ddpm-cifar10-32"),
    "unconditional": ("anton-l/ddpm-butterflies-128",),
    "latent_text": ("CompVis/ldm-text2im-large-256",),
    "xl_base": ("stabilityai/stable-diffusion-xl-base-1.0", "stabilityai/stable-diffusion-xl-base-0.9"),
    "xl_turbo": ("stabilityai/sdxl-turbo",),
    "xl_refiner": ("stabilityai/stable-diffusion-xl-refiner-1.0",),
    "learned_word": ("sd-concepts-library/cat-toy",),
    "controlnet": ("lllyasviel/sd-controlnet-canny",),
    "adapter": ("civitai/models-19998",),
    "custom_pipeline": ("hf-internal-testing/diffusers-dummy-pipeline",),
}  # fmt: skip
"""Function of `checkpoints` -> hub ids under which its result lies."""
PICTURES: Mapping[str, tuple[int, int, bool]] = {
    "https://raw.githubusercontent.com/CompVis/stable-diffusion/main/assets/stable-samples/img2img/"
    "sketch-mountains-input.jpg": (96, 64, False),
    "https://raw.githubusercontent.com/CompVis/latent-diffusion/main/data/inpainting_examples/"
    "overture-creations-5sI6fQgYIuo.png": (64, 64, False),
    "https://raw.githubusercontent.com/CompVis/latent-diffusion/main/data/inpainting_examples/"
    "overture-creations-5sI6fQgYIuo_mask.png": (64, 64, True),
    "http://images.cocodataset.org/val2017/000000039769.jpg": (80, 64, False),
    "https://huggingface.co/datasets/patrickvonplaten/images/resolve/main/aa_xl/000000009.png": (64, 64, False),
    "https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/diffusers/cat.png": (64, 64, False),
}
"""Address -> width, height, and whether it is a mask."""


def filled(place: Path, recipes: Mapping[str, tuple[str, ...]] = RECIPES) -> Path:
    """A folder below `place` with the cache (`hub`) and the pictures (`pictures`); made once per state of the recipes.

    Raises OutputError: it cannot be written.
    """
    import diffusers
    import transformers

    from anamorph.benchmarks.snippets import checkpoints

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()

    sources = [Path(__file__).with_name(f"{name}.py") for name in ("cache", "checkpoints", "original", "sizes")]
    key = hashlib.sha256(b"".join([repr(recipes).encode(), *(source.read_bytes() for source in sources)])).hexdigest()
    folder = place / key[:16]
    with drafted(folder) as draft:
        if draft is not None:
            for recipe, ids in recipes.items():
                getattr(checkpoints, recipe)(draft / "made")
                for name in ids:
                    enter(draft / "hub", name, draft / "made")
                shutil.rmtree(draft / "made")
            draw(draft / "pictures")
    return folder


def enter(hub: Path, name: str, folder: Path) -> None:
    """Put a folder into the cache as the hub id `name`, in the layout of huggingface_hub; its files are linked."""
    root = hub / f"models--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    shutil.copytree(folder, root / "snapshots" / COMMIT, copy_function=os.link)


def found(hub: Path, name: str) -> Path:
    """Where a hub id, or a file below one, lies in the cache.

    Raises InputError: it is not there.
    """
    owner, repository, *inside = name.split("/")
    path = (hub / f"models--{owner}--{repository}" / "snapshots" / COMMIT).joinpath(*inside)
    if not path.exists():
        raise InputError(f"the cache has no {name}; name it in RECIPES")
    return path


def picture_name(address: str) -> str:
    """File of an address below the folder of pictures."""
    return hashlib.sha256(address.encode()).hexdigest()[:16] + ".png"


def draw(folder: Path) -> None:
    """Write the pictures: gradients, and masks with a rectangle."""
    folder.mkdir()
    for address, (width, height, mask) in PICTURES.items():
        y, x = np.mgrid[:height, :width].astype(np.float32)
        planes = np.stack([x / width, y / height, (x + y) / (width + height)], -1)
        inside = (abs(x / width - 0.5) < 0.25) & (abs(y / height - 0.5) < 0.25)
        shown = np.repeat(inside[..., None], 3, -1) if mask else planes
        Image.fromarray((shown * 255).astype(np.uint8)).save(folder / picture_name(address))
