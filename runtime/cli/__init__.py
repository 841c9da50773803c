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
    from anamorph.cli import drawing_commands, model_commands

    root = argparse.ArgumentParser(
        prog="anamorph",
        description="One diffusion checkpoint, every engine, the same picture.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="store_true", help="print the version and leave")
    commands = root.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    drawing_commands.generate(commands)
    drawing_commands.control(commands)
    drawing_commands.demo(commands)
    model_commands.backends(commands)
    drawing_commands.schedulers(commands)
    drawing_commands.compare(commands)
    drawing_commands.replay(commands)
    model_commands.export(commands)
    model_commands.verify(commands)
    model_commands.info(commands)
    model_commands.doctor(commands)
    model_commands.cache(commands)
    model_commands.bench(commands)
    model_commands.tune(commands)
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
