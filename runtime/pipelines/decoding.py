"""Latents to pictures, by whichever autoencoder a pipeline has."""

from typing import Any

from anamorph.arrays import Array
from anamorph.engine import Program
from anamorph.pipelines.outputs import check_output_type, finish_images
from anamorph.pipelines.sampling import FiniteCheck


def decoded(program: Program, scaling: float, latents: Array, output_type: str) -> Any:
    """Latents of the denoiser (or NumPy, or a tensor), over `scaling`, by a decoder, as `output_type` says."""
    check_output_type(output_type)
    if output_type == "latent":
        return latents
    sample = program.arrays.accept(latents) / scaling
    pixels = program.session()({"latent_sample": sample})["sample"]
    FiniteCheck(program.arrays, "vae_decoder").add_now(pixels, "decoding the latents")
    return finish_images(program.arrays.get(pixels), output_type)
