"""`anamorph tune`: its arguments; what it does lies with the measurements, like `anamorph bench`."""

import argparse

from anamorph.cli.bench import run

__all__ = ["arguments", "run"]


def arguments(command: argparse.ArgumentParser) -> None:
    """Add its options."""
    command.set_defaults(action="tune")
    command.add_argument("model", nargs="?", help="checkpoint folder or hub id (default: the bundled model)")
    command.add_argument(
        "--quality",
        choices=("lossless", "high", "fast"),
        default="high",
        help="how near pictures stay to eager's in float32: 60 dB, 35 dB or 25 dB (default: high)",
    )
    command.add_argument("--out", help="JSONL file to write or to go on with (default: out/tune-QUALITY.jsonl)")
