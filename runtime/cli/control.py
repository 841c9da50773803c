"""`anamorph control`: pictures that nets follow, made without any model."""

import argparse
from pathlib import Path

import numpy as np

from anamorph.cli import OK
from anamorph.cli.sources import read_picture
from anamorph.control_images import canny, depth, tile
from anamorph.errors import InputError
from anamorph.files import replacing


def run(options: argparse.Namespace) -> int:
    """Make the picture and write it."""
    source, out = Path(options.picture), Path(options.out)
    if out.suffix.lower() != ".png":
        raise InputError(f"--out {options.out} does not end in .png")
    if options.kind == "depth":
        try:
            values = np.load(source, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"{source} cannot be read as an array ({error}); give a .npy file of depths") from None
        made = depth(values)
    elif options.kind == "canny":
        made = canny(read_picture(source, "picture").convert("RGB"), options.low, options.high)
    else:
        made = tile(read_picture(source, "picture"), options.resolution)
    with replacing(out) as draft:
        made.save(draft, format="PNG")
    print(f"{out}  {made.width}x{made.height}")
    return OK
