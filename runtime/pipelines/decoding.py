"""Latents to pictures, by whichever autoencoder a pipeline has, and the pictures that a safety checker holds back."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.arrays import Array
from anamorph.clip_image import CLIPImageProcessor
from anamorph.decoders import PICTURES, SCALED
from anamorph.engine import Program
from anamorph.image import to_pil, to_uint8
from anamorph.pipelines.loaded import Loaded
from anamorph.pipelines.sampling import FiniteCheck
from anamorph.safety import flagged
from anamorph.scaling import Scaling
from anamorph.tiling import Operations, Tiles, autoencoder_tiles, sparing

PART = "vae_decoder"


def decoded(vae: Loaded, scaling: Scaling, latents: Array) -> NDArray[Any]:
    """Latents of the denoiser (or NumPy, or a tensor) to pictures in about -1..1 [N, C, H, W]."""
    return _decoded(vae, scaling, latents, "sample")


def decoded_bytes(vae: Loaded, scaling: Scaling, latents: Array) -> NDArray[Any]:
    """The same as bytes [N, H, W, C], which the decoder makes itself where it can and no tiles are blended."""
    if vae.sparing.tiling or PICTURES not in {port.name for port in vae.programs[PART].interface.outputs}:
        return to_uint8(_decoded(vae, scaling, latents, "sample"))
    return _decoded(vae, scaling, latents, PICTURES)


def _decoded(vae: Loaded, scaling: Scaling, latents: Array, output: str) -> NDArray[Any]:
    _, cut = autoencoder_tiles(vae.config)
    program = vae.programs[PART]
    arrays, (taken,) = program.arrays, program.interface.inputs
    sample = arrays.accept(latents)
    if taken.name != SCALED:
        sample = scaling.unscaled(sample, arrays.put)
    elif (own := Scaling.of(vae.config)).factor != scaling.factor:  # a pipeline may know better than a configuration
        sample = sample * (own.factor / scaling.factor)
    return arrays.get(divided(vae, PART, sample, cut, "decoding the latents", output))


def divided(loaded: Loaded, part: str, values: Array, cut: Tiles, where: str, output: str | None = None) -> Array:
    """An output of an autoencoder's part, by default its first, for its only input [B, C, h, w].

    In pieces where that is on; `where` is what errors call this. Raises NumericalError: the first is not finite.
    """
    program, wish = loaded.programs[part], loaded.sparing
    session, check = program.session(), FiniteCheck.of(program)
    (taken,) = (port.name for port in program.interface.inputs)
    first = program.interface.outputs[0].name

    def call(piece: Array) -> Array:
        found = session({taken: piece})
        check.add(found[first], where)
        return found[output or first]

    operations = Operations(lambda parts, axis: program.arrays.concat(list(parts), axis), program.arrays.put)
    whole = sparing(call, values, cut, operations, slicing=wish.slicing, tiling=wish.tiling)
    check.settle()
    return whole


def held_back(program: Program, processor: CLIPImageProcessor, pixels: NDArray[Any]) -> NDArray[np.bool_]:
    """Which pictures in about -1..1 [N, C, H, W], or as bytes [N, H, W, C], a safety checker holds back, [N]."""
    scores = program.session()({"clip_input": program.arrays.put(processor(to_pil(pixels)))})
    special, concepts = (np.asarray(program.arrays.get(scores[name])) for name in ("special", "concepts"))
    return flagged(special, concepts)
