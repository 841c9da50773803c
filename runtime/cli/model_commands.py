"""Commands about models, exports and engines, and what they take."""

import argparse

from anamorph.cli.options import Commands, engine_options, rewrites_option, trust_option


def backends(commands: Commands) -> None:
    """Add `anamorph backends`."""
    command = commands.add_parser(
        "backends",
        help="list the engines, and what is missing for those that cannot run",
        description="List the engines that plug-ins offer. ANAMORPH_PLUGINS narrows the plug-ins that are imported: "
        "`none`, or names joined by commas.",
    )
    command.add_argument(
        "--matrix", action="store_true", help="every task, engine, device and precision: which work here, and why not"
    )
    command.add_argument("--json", action="store_true", help="print the list as JSON")


def export(commands: Commands) -> None:
    """Add `anamorph export`."""
    command = commands.add_parser(
        "export",
        help="write a checkpoint as a certified folder for another engine",
        description="Write a checkpoint in the format of another engine, compare each part and a whole picture with "
        "PyTorch in a fresh process, and move the folder into place. Running it needs no PyTorch.",
    )
    export_arguments(command)


def export_arguments(command: argparse.ArgumentParser) -> None:
    """The arguments of `anamorph export`."""
    command.add_argument("model", help="checkpoint folder in diffusers' layout, hub id, or the word bundled")
    command.add_argument("out", help="folder to write; it must not exist")
    command.add_argument(
        "--to", required=True, metavar="FORMAT", help="such as onnx or openvino (see `anamorph doctor`)"
    )
    command.add_argument(
        "--dtype", help="type of the weights on disk: fp32, fp16 or bf16 (default: fp32, for coreml fp16)"
    )
    command.add_argument(
        "--signature",
        choices=("portable", "native"),
        default="portable",
        help="the inputs that other tools feed, or also our own optional ones (default: portable)",
    )
    command.add_argument(
        "--link",
        action="store_true",
        help="write graphs alone and leave the weights in the checkpoint, which must stay (native signature)",
    )
    rewrites_option(command, "the format, for the native signature")
    command.add_argument(
        "--static",
        metavar="HxW",
        help="take this size alone, in pixels (default: any size; for coreml the model's own, or several with commas)",
    )
    command.add_argument("--batch", type=int, metavar="N", help="take N pictures at a time alone (default: any number)")
    _int8(command)
    _coreml(command)
    command.add_argument("--variant", help="weights variant of the checkpoint, such as fp16")
    command.add_argument("--json", action="store_true", help="print the certificate as JSON")


def _int8(command: argparse.ArgumentParser) -> None:
    command.add_argument("--quantize", choices=("int8",), help="let the denoiser's layers multiply whole numbers")
    command.add_argument(
        "--calibrate", metavar="FILE", help="text file of prompts to draw, one on each line, for the ranges of int8"
    )
    command.add_argument(
        "--quantize-error",
        type=float,
        default=0.05,
        metavar="ERROR",
        help="leave the most harmful layers in float32 until a call differs by so much (relative L2; default: 0.05)",
    )


def _coreml(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--attention",
        choices=("split_einsum", "original"),
        help="coreml: attention for the Neural Engine, or for graphics processors (default: split_einsum)",
    )
    command.add_argument(
        "--palettize",
        type=int,
        metavar="BITS",
        help="coreml: weights as indices of so many bits into tables, such as 6",
    )
    command.add_argument("--chunk-unet", action="store_true", help="coreml: the denoiser in two packages, for phones")
    command.add_argument(
        "--apple-names",
        metavar="VERSION",
        help="coreml: files and inputs as apple/ml-stable-diffusion looks for them under this --model-version",
    )


def verify(commands: Commands) -> None:
    """Add `anamorph verify`."""
    command = commands.add_parser(
        "verify",
        help="compare an exported folder with its checkpoint again",
        description="Compare an exported folder with the checkpoint that it was made from: each part, a picture step "
        "by step, and the blocks of parts that differ. Names the first step, part and block that differ and leaves "
        "with 3.",
    )
    command.add_argument("folder", help="folder written by `anamorph export`")
    command.add_argument("--model", help="where the checkpoint lies now (default: where it was)")
    command.add_argument("--variant", help="weights variant that was exported, such as fp16")
    command.add_argument("--blocks", action="store_true", help="compare the blocks of all parts")
    trust_option(command)
    command.add_argument("--json", action="store_true", help="print the comparison as JSON")


def info(commands: Commands) -> None:
    """Add `anamorph info`."""
    command = commands.add_parser(
        "info",
        help="what a model is made of, and what it can do here",
        description="List a model's components with parameters, sizes and types, the tasks it can serve and the "
        "engines that open it; no weights are read and nothing is downloaded.",
    )
    command.add_argument(
        "model",
        help="checkpoint folder, exported folder, .safetensors or .ckpt file, cached hub id, or the word bundled",
    )
    command.add_argument("--variant", help="weights variant of the checkpoint, such as fp16")
    command.add_argument("--json", action="store_true", help="print the findings as JSON")


def doctor(commands: Commands) -> None:
    """Add `anamorph doctor`."""
    command = commands.add_parser(
        "doctor",
        help="what is installed, what each engine can do here, what is missing",
        description="Say what is installed, what each engine and exporter can do on this machine, and how to install "
        "what is missing; for a model, which tasks run where, in which sizes, and what memory and disk they take. "
        "Nothing is loaded.",
    )
    command.add_argument(
        "model", nargs="?", help="checkpoint folder, exported folder, file, cached hub id, or the word bundled"
    )
    command.add_argument("--variant", help="weights variant of the checkpoint, such as fp16")
    command.add_argument("--json", action="store_true", help="print the findings as JSON")


def cache(commands: Commands) -> None:
    """Add `anamorph cache`."""
    command = commands.add_parser(
        "cache",
        help="what is kept between starts: list, explain, make ahead, remove",
        description="Exports and compiled models are kept in the user's cache (ANAMORPH_CACHE names another folder), "
        "so that the next start takes seconds. A damaged one is noticed, removed and made again.",
    )
    actions = command.add_subparsers(dest="action", metavar="ACTION", title="actions", required=True)
    listed = actions.add_parser("ls", help="what is there, its size and the days since it was last used")
    listed.add_argument("--json", action="store_true", help="print the list as JSON")
    explain = actions.add_parser("explain", help="what a start finds for a model, and why it does not find the rest")
    explain.add_argument("--json", action="store_true", help="print it as JSON")
    prebuild = actions.add_parser("prebuild", help="make all that later starts need, by drawing one step")
    prebuild.add_argument("--size", metavar="HxW", help="height x width in pixels (default: the model's own)")
    prebuild.add_argument("--count", type=int, default=1, help="pictures at a time (default: 1)")
    for action in (explain, prebuild):
        action.add_argument("model", help="checkpoint folder, exported folder, hub id, or the word bundled")
        action.add_argument("--variant", help="weights variant of the checkpoint, such as fp16")
        engine_options(action)
    remove = actions.add_parser("rm", help="remove what is named, or what was not used")
    remove.add_argument("names", nargs="*", metavar="NAME", help="as `ls` prints it")
    remove.add_argument("--unused", type=float, metavar="DAYS", help="what was not used for so many days")
    remove.add_argument("--all", action="store_true", help="everything")


def bench(commands: Commands) -> None:
    """Add `anamorph bench`."""
    from anamorph.cli.bench import DESCRIPTION, arguments

    arguments(
        commands.add_parser(
            "bench", help="which engine is best here: measure, report, compare", description=DESCRIPTION
        )
    )


def tune(commands: Commands) -> None:
    """Add `anamorph tune`."""
    from anamorph.cli.tune import arguments

    arguments(
        commands.add_parser(
            "tune",
            help="find what draws a model fastest here within a fidelity; backend=auto takes it from then on",
            description="Measure every engine here, and where the quality allows it lower precisions, int8 and merged "
            "tokens, on whole pictures of a model; keep what is fastest within the fidelity asked for, and say why.",
        )
    )
