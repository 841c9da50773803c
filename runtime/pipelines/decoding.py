"""Latents to pictures, by whichever autoencoder a pipeline has, and the pictures that a safety checker holds back."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.arrays import Array
from anamorph.clip_image import CLIPImageProcessor
from anamorph.engine import Program
from anamorph.image import to_pil
from anamorph.pipelines.loaded import Loaded, divided
from anamorph.pipelines.sampling import FiniteCheck
from anamorph.pipelines.scaling import Scaling
from anamorph.safety import flagged
from anamorph.tiling import autoencoder_tiles


def decoded(vae: Loaded, scaling: Scaling, latents: Array) -> NDArray[Any]:
    """Latents of the denoiser (or NumPy, or a tensor) to pictures in about -1..1 [N, C, H, W]."""
    _, cut = autoencoder_tiles(vae.config)
    program = vae.programs["vae_decoder"]
    sample = scaling.unscaled(program.arrays.accept(latents), program.arrays.put)
    pixels = divided(vae, "vae_decoder", "latent_sample", sample, cut)
    FiniteCheck.of(program).add_now(pixels, "decoding the latents")
    return program.arrays.get(pixels)


def held_back(program: Program, processor: CLIPImageProcessor, pixels: NDArray[Any]) -> NDArray[np.bool_]:
    """Which pictures in about -1..1 [N, C, H, W] a safety checker holds back, [N]."""
    scores = program.session()({"clip_input": program.arrays.put(processor(to_pil(pixels)))})
    special, concepts = (np.asarray(program.arrays.get(scores[name])) for name in ("special", "concepts"))
    return flagged(special, concepts)
