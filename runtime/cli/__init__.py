"""The command line: `anamorph generate | demo | compare | replay | schedulers | backends | export | ...`."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from anamorph.errors import AnamorphError, InputError

OK, FAILED, USAGE, DIFFERENT, INTERRUPTED = 0, 1, 2, 3, 130

EPILOG = """\
exit codes: 0 done, 1 failed, 2 wrong arguments, 3 a picture or an export differs too much or a benchmark got
slower, 130 interrupted

examples:
  anamorph generate "red apple" --out apple.png
  anamorph generate "rocket" "sunflower" --seed 7 --backend compile
  anamorph generate "a lighthouse at dusk" --model ./stable-diffusion-v1-5 --size 512x512 --dtype bf16
  anamorph generate "a lighthouse" --model ./stable-diffusion-v1-5 --lora etching.safetensors:0.8 --lora-mode fused
  anamorph generate "make it night" --task edit --model ./instruct-pix2pix --image lighthouse.png
  anamorph control canny photo.png --out edges.png
  anamorph generate "a castle" --model ./sd15 --controlnet canny=./sd-canny --control canny=edges.png:0.8
  anamorph generate --model ./DiT-XL-2-256 --class-label "golden retriever" 33 --count 2
  anamorph compare "rocket" --schedulers DDIM,UniPCMultistep --steps 4,8,16 --out compare.png
  anamorph replay apple.png --backend compile
  anamorph export ./stable-diffusion-v1-5 ./sd15-openvino --to openvino --static 512x512 --batch 1
  anamorph bench quick
"""


def parser() -> argparse.ArgumentParser:
    """All commands and their arguments; the modules that do the work are imported when they run."""
    root = argparse.ArgumentParser(
        prog="anamorph",
        description="One diffusion checkpoint, every engine, the same picture.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="store_true", help="print the version and leave")
    commands = root.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    _generate(commands)
    _control(commands)
    _demo(commands)
    _backends(commands)
    _schedulers(commands)
    _compare(commands)
    _replay(commands)
    _export(commands)
    _verify(commands)
    _info(commands)
    _doctor(commands)
    _cache(commands)
    _bench(commands)
    _tune(commands)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; see `finish`."""
    root = parser()
    options = root.parse_args(arguments)
    if options.version:
        import anamorph

        print(anamorph.__version__)
        return OK
    if options.command is None:
        root.print_help()
        return USAGE
    return finish(options)


def finish(options: argparse.Namespace) -> int:
    """Run the command that was read; every foreseen failure is one sentence on the error stream and an exit code."""
    try:
        code: int = _run(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _say("interrupted; nothing more was written", INTERRUPTED)
    except InputError as error:
        return _say(str(error), USAGE)
    except AnamorphError as error:
        return _say(str(error), FAILED)
    except BrokenPipeError:
        # The reader of a pipe has gone; what is left in the buffer must not fail again while Python closes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _run(options: argparse.Namespace) -> int:
    import warnings

    warnings.showwarning = lambda message, *_: print(f"anamorph: warning: {message}", file=sys.stderr)
    module = importlib.import_module(f"anamorph.cli.{options.command}")  # each command has a module of its name
    code: int = module.run(options)
    return code


def _say(message: str, code: int) -> int:
    print(f"anamorph: {message}", file=sys.stderr)
    return code


Commands = argparse._SubParsersAction  # argparse gives its type no public name


def _generate(commands: "Commands[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "generate",
        help="make pictures from prompts",
        description="Make pictures from prompts. Each PNG carries the whole request, so that `anamorph replay` can "
        "make it again on any engine.",
    )
    command.add_argument("prompt", nargs="*", help="what to draw; several prompts make several pictures")
    command.add_argument(
        "--model",
        help="checkpoint folder in diffusers' layout, file, or hub id (default: the bundled model)",
    )
    command.add_argument(
        "--task",
        choices=("text-to-image", "image-to-image", "inpainting", "depth", "edit", "upscale", "unconditional", "class"),
        help="what to do (default: what the pictures given call for, or what the checkpoint is for)",
    )
    command.add_argument("--negative", metavar="TEXT", help="what to stay away from")
    command.add_argument("--prompt-2", metavar="TEXT", help="the text for a second encoder (default: the prompt)")
    command.add_argument("--negative-2", metavar="TEXT", help="the negative text for a second encoder")
    command.add_argument("--steps", type=int, help="denoising steps (default: 20, or what a distilled model wants)")
    command.add_argument("--guidance", type=float, help="guidance scale (default: 7.5; 4 for the bundled model)")
    command.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("START", "END"),
        help="guide this part of the steps alone, 0 to 1: the others take half the time (default: all)",
    )
    command.add_argument(
        "--step-caching",
        type=lambda text: float(text) if "." in text else int(text),
        metavar="STEPS",
        help="compute every so many steps in full, or, below 1, whenever the picture has changed by that part; the "
        "others take the last layer alone (needs the rewrite step-caching)",
    )
    _sources(command)
    _loras(command)
    command.add_argument(
        "--lora-mode",
        choices=("hot", "fused"),
        default="hot",
        help="hot: factors come with each call, which costs some time per step; fused: they are added to the weights "
        "first, and the engine compiles these anew (default: hot)",
    )
    command.add_argument(
        "--strength", type=float, help="how much of the picture is drawn anew, 0 to 1 (default: 0.8; 1 with a mask)"
    )
    command.add_argument("--image-guidance", type=float, help="how close to the picture an edit stays (default: 1.5)")
    command.add_argument("--noise-level", type=int, help="how much an upscaler noises the picture (default: 20)")
    command.add_argument(
        "--class-label", nargs="+", metavar="CLASS", help="numbers or names of classes, a picture of each"
    )
    command.add_argument(
        "--size", metavar="HxW", help="height x width in pixels, such as 512x768 (default: the model's own)"
    )
    command.add_argument("--seed", type=int, help="seed of the first picture, counting up (default: random)")
    command.add_argument("--count", type=int, default=1, help="pictures per prompt (default: 1)")
    command.add_argument(
        "--scheduler", metavar="NAME", help="such as EulerDiscreteScheduler (default: the checkpoint's)"
    )
    command.add_argument("--variant", help="weights variant of the checkpoint, such as fp16")
    _engine(command)
    command.add_argument(
        "--out", default="out/anamorph.png", help="PNG to write; several are numbered (default: %(default)s)"
    )
    command.add_argument(
        "--explain", action="store_true", help="say for which sizes models were compiled or found in the cache, and why"
    )
    command.add_argument("--json", action="store_true", help="print what was made as JSON")


def _sources(command: argparse.ArgumentParser) -> None:
    command.add_argument("--image", metavar="FILE", help="picture to start from (RGB)")
    command.add_argument("--mask", metavar="FILE", help="white where the picture is to be drawn anew")
    command.add_argument(
        "--depth-map", metavar="FILE", help="grey picture, lighter is nearer (default: the checkpoint's estimate)"
    )
    command.add_argument(
        "--ip-adapter",
        action="append",
        metavar="FILE[:SCALE]",
        help="let pictures be prompts: an IP-Adapter's file, or a folder with one (default scale: 1); may be repeated",
    )
    command.add_argument(
        "--ip-adapter-image",
        action="append",
        metavar="FILE",
        help="the picture that an IP-Adapter looks at: once for each adapter, or several times for a single one",
    )
    command.add_argument(
        "--ip-adapter-encoder",
        metavar="FOLDER",
        help="the picture encoder (default: the checkpoint's own, or image_encoder beside the first IP-Adapter)",
    )
    command.add_argument(
        "--controlnet",
        action="append",
        metavar="[NET=]FOLDER",
        help="ControlNet or T2I-Adapter whose picture is followed, called NET; may be given several times",
    )
    command.add_argument(
        "--control",
        action="append",
        metavar="[NET=]FILE[:SCALE]",
        help="the picture that NET follows, and how strongly, such as canny=edges.png:0.8; `anamorph control` makes "
        "such pictures",
    )


def _loras(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--lora",
        metavar="FILE[:WEIGHT]",
        action="append",
        default=[],
        help="adapter (LoRA, LoCon, LoHa of diffusers, PEFT or Kohya), and how much it counts, such as "
        "style.safetensors:0.8 (default: 1); may be given several times",
    )


def _engine(command: argparse.ArgumentParser) -> None:
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
    _trust(command)
    _rewrites(command, "the engine")


def _trust(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run machine code of an exported folder that you trust (what you exported yourself lies in the cache)",
    )


def _rewrites(command: argparse.ArgumentParser, where: str) -> None:
    from anamorph.rewrites import REWRITES

    known = "; ".join(f"{rewrite.name}: {rewrite.meaning}" for rewrite in REWRITES.values())
    command.add_argument(
        "--rewrites",
        metavar="NAMES",
        help=f"ways to compute the same with less work: all exact ones, none, or names with commas between them "
        f"(default: those that pay with {where}). {known}",
    )


def _control(commands: "Commands[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "control",
        help="make a picture that a ControlNet follows",
        description="Make a picture that ControlNets or T2I-Adapters follow of another picture, without any model: "
        "edges (canny), a size that nets for detail take (tile), or grey depths from an array (depth, a .npy file).",
    )
    command.add_argument("kind", choices=("canny", "tile", "depth"), help="what to make")
    command.add_argument("picture", help="picture, or a .npy file of inverse depths [H, W] for depth")
    command.add_argument("--out", required=True, metavar="FILE", help="PNG to write")
    command.add_argument("--low", type=float, default=100, help="canny: gradient of weak edges (default: 100)")
    command.add_argument("--high", type=float, default=200, help="canny: gradient of strong edges (default: 200)")
    command.add_argument("--resolution", type=int, default=512, help="tile: the shorter side (default: 512 pixels)")


def _demo(commands: "Commands[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "demo",
        help="the bundled model on every engine that is available here",
        description="Draw the same prompts with every available engine, compare them with eager and write a labelled "
        "contact sheet.",
    )
    command.add_argument("--out", default="out/demo.png", help="contact sheet to write (default: %(default)s)")
    command.add_argument("--steps", type=int, default=20, help="denoising steps (default: 20)")
    command.add_argument("--json", action="store_true", help="print the table as JSON")


def _backends(commands: "Commands[argparse.ArgumentParser]") -> None:
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


def _schedulers(commands: "Commands[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "schedulers",
        help="list the samplers, and when to use which",
        description="List the samplers with a line each on when to use which.",
    )
    command.add_argument("--json", action="store_true", help="print the list as JSON")


def _compare(commands: "Commands[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "compare",
        help="draw a prompt with several samplers and numbers of steps",
        description="Draw a prompt with several samplers and numbers of steps, and write a labelled contact sheet with "
        "a plot of their distances to a reference of many steps.",
    )
    command.add_argument("prompt", help="what to draw")
    command.add_argument(
        "--schedulers", required=True, metavar="A,B,C", help="such as DDIM,UniPCMultistep,HeunDiscrete"
    )
    command.add_argument("--steps", default="4,8,16,32", metavar="N,N", help="numbers of steps (default: %(default)s)")
    command.add_argument(
        "--reference-steps", type=int, default=1000, metavar="N", help="steps of the reference (default: %(default)s)"
    )
    command.add_argument("--model", help="checkpoint folder or hub id (default: the bundled model)")
    command.add_argument("--guidance", type=float, help="guidance scale (default: 7.5; 4 for the bundled model)")
    command.add_argument("--size", metavar="HxW", help="height x width in pixels (default: the model's own)")
    command.add_argument("--seed", type=int, default=0, help="seed of every picture (default: %(default)s)")
    _engine(command)
    command.add_argument("--out", default="out/compare.png", help="PNG to write (default: %(default)s)")
    command.add_argument("--json", action="store_true", help="print the distances as JSON")


def _replay(commands: "Commands[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "replay",
        help="make a picture again from the request inside its PNG",
        description="Make a picture again from the request inside its PNG, on the same or another engine, and say how "
        "close it came.",
    )
    command.add_argument("picture", help="PNG written by `anamorph generate`")
    _sources(command)
    _loras(command)
    command.add_argument("--model", help="where the checkpoint lies now (default: where it was)")
    _engine(command)
    command.add_argument("--out", help="PNG to write (default: NAME-replay.png beside the picture)")
    command.add_argument("--min-psnr", type=float, metavar="DB", help="exit with 3 if the PSNR is lower (dB)")
    command.add_argument("--json", action="store_true", help="print the comparison as JSON")


def _export(commands: "Commands[argparse.ArgumentParser]") -> None:
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
    _rewrites(command, "the format, for the native signature")
    command.add_argument(
        "--static",
        metavar="HxW",
        help="take this size alone, in pixels (default: any size; for coreml the model's own, or several with commas)",
    )
    command.add_argument("--batch", type=int, metavar="N", help="take N pictures at a time alone (default: any number)")
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
    command.add_argument("--variant", help="weights variant of the checkpoint, such as fp16")
    command.add_argument("--json", action="store_true", help="print the certificate as JSON")


def _verify(commands: "Commands[argparse.ArgumentParser]") -> None:
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
    _trust(command)
    command.add_argument("--json", action="store_true", help="print the comparison as JSON")


def _info(commands: "Commands[argparse.ArgumentParser]") -> None:
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


def _doctor(commands: "Commands[argparse.ArgumentParser]") -> None:
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


def _cache(commands: "Commands[argparse.ArgumentParser]") -> None:
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
        _engine(action)
    remove = actions.add_parser("rm", help="remove what is named, or what was not used")
    remove.add_argument("names", nargs="*", metavar="NAME", help="as `ls` prints it")
    remove.add_argument("--unused", type=float, metavar="DAYS", help="what was not used for so many days")
    remove.add_argument("--all", action="store_true", help="everything")


def _bench(commands: "Commands[argparse.ArgumentParser]") -> None:
    from anamorph.cli.bench import DESCRIPTION, arguments

    arguments(
        commands.add_parser(
            "bench", help="which engine is best here: measure, report, compare", description=DESCRIPTION
        )
    )


def _tune(commands: "Commands[argparse.ArgumentParser]") -> None:
    from anamorph.cli.tune import arguments

    arguments(
        commands.add_parser(
            "tune",
            help="find what draws a model fastest here within a fidelity; backend=auto takes it from then on",
            description="Measure every engine here, and where the quality allows it lower precisions, int8 and merged "
            "tokens, on whole pictures of a model; keep what is fastest within the fidelity asked for, and say why.",
        )
    )
