"""Options that several commands have."""

import argparse
from typing import TypeAlias

from anamorph.memory import APART, JOINT

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # argparse gives its type no public name


def engine_options(command: argparse.ArgumentParser) -> None:
    """Add the options that choose engine, device and precision."""
    command.add_argument(
        "--backend",
        help="engine (see `anamorph backends`), or one per component: unet=compile,vae=eager (default: auto, the "
        "available engine of the highest rank)",
    )
    command.add_argument("--device", help="such as cpu or cuda (default: the engine's first)")
    command.add_argument("--dtype", help="execution precision: fp32, bf16 or fp16 (default: the engine's first)")
    command.add_argument(
        "--backend-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="what else to tell the engine, such as provider=cuda (see `anamorph backends --json`; may be repeated)",
    )
    trust_option(command)
    rewrites_option(command, "the engine")
    command.add_argument(
        "--guidance-batch",
        choices=(JOINT, APART),
        help="whether branches of guidance share a call of the denoiser, or have one each, which takes less memory "
        "(default: what `anamorph tune` found to be faster, or joint)",
    )


def trust_option(command: argparse.ArgumentParser) -> None:
    """Add the option that lets code of a folder run."""
    command.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run machine code of an exported folder that you trust (what you exported yourself lies in the cache)",
    )


def rewrites_option(command: argparse.ArgumentParser, where: str) -> None:
    """Add the option that names rewrites; `where` they run, for the help."""
    from anamorph.rewrites import REWRITES

    known = "; ".join(f"{rewrite.name}: {rewrite.meaning}" for rewrite in REWRITES.values())
    command.add_argument(
        "--rewrites",
        metavar="NAMES",
        help=f"ways to compute the same with less work: all exact ones, none, or names with commas between them "
        f"(default: those that pay with {where}). {known}",
    )
