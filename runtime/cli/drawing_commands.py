"""Commands that draw, and what they take."""

import argparse

from anamorph.cli.options import Commands, engine_options


def generate(commands: Commands) -> None:
    """Add `anamorph generate`."""
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
    _words(command)
    _steps(command)
    _sources(command)
    _loras(command)
    _lora_mode(command)
    _tasks(command)
    command.add_argument(
        "--size", metavar="HxW", help="height x width in pixels, such as 512x768 (default: the model's own)"
    )
    command.add_argument("--seed", type=int, help="seed of the first picture, counting up (default: random)")
    command.add_argument("--count", type=int, default=1, help="pictures per prompt (default: 1)")
    command.add_argument(
        "--scheduler", metavar="NAME", help="such as EulerDiscreteScheduler (default: the checkpoint's)"
    )
    command.add_argument("--variant", help="weights variant of the checkpoint, such as fp16")
    engine_options(command)
    command.add_argument(
        "--out", default="out/anamorph.png", help="PNG to write; several are numbered (default: %(default)s)"
    )
    command.add_argument(
        "--explain", action="store_true", help="say for which sizes models were compiled or found in the cache, and why"
    )
    command.add_argument("--json", action="store_true", help="print what was made as JSON")


def _words(command: argparse.ArgumentParser) -> None:
    command.add_argument("--negative", metavar="TEXT", help="what to stay away from")
    command.add_argument("--prompt-2", metavar="TEXT", help="the text for a second encoder (default: the prompt)")
    command.add_argument("--negative-2", metavar="TEXT", help="the negative text for a second encoder")


def _steps(command: argparse.ArgumentParser) -> None:
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


def _lora_mode(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--lora-mode",
        choices=("hot", "fused"),
        default="hot",
        help="hot: factors come with each call, which costs some time per step; fused: they are added to the weights "
        "first, and the engine compiles these anew (default: hot)",
    )


def _tasks(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--strength", type=float, help="how much of the picture is drawn anew, 0 to 1 (default: 0.8; 1 with a mask)"
    )
    command.add_argument("--image-guidance", type=float, help="how close to the picture an edit stays (default: 1.5)")
    command.add_argument("--noise-level", type=int, help="how much an upscaler noises the picture (default: 20)")
    command.add_argument(
        "--class-label", nargs="+", metavar="CLASS", help="numbers or names of classes, a picture of each"
    )


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
        "such pictures; a net for several kinds is named with the number of one, as NET.KIND, or KIND if it is alone",
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


def control(commands: Commands) -> None:
    """Add `anamorph control`."""
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


def demo(commands: Commands) -> None:
    """Add `anamorph demo`."""
    command = commands.add_parser(
        "demo",
        help="the bundled model on every engine that is available here",
        description="Draw the same prompts with every available engine, compare them with eager and write a labelled "
        "contact sheet.",
    )
    command.add_argument("--out", default="out/demo.png", help="contact sheet to write (default: %(default)s)")
    command.add_argument("--steps", type=int, default=20, help="denoising steps (default: 20)")
    command.add_argument("--json", action="store_true", help="print the table as JSON")


def schedulers(commands: Commands) -> None:
    """Add `anamorph schedulers`."""
    command = commands.add_parser(
        "schedulers",
        help="list the samplers, and when to use which",
        description="List the samplers with a line each on when to use which.",
    )
    command.add_argument("--json", action="store_true", help="print the list as JSON")


def compare(commands: Commands) -> None:
    """Add `anamorph compare`."""
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
    engine_options(command)
    command.add_argument("--out", default="out/compare.png", help="PNG to write (default: %(default)s)")
    command.add_argument("--json", action="store_true", help="print the distances as JSON")


def replay(commands: Commands) -> None:
    """Add `anamorph replay`."""
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
    engine_options(command)
    command.add_argument("--out", help="PNG to write (default: NAME-replay.png beside the picture)")
    command.add_argument("--min-psnr", type=float, metavar="DB", help="exit with 3 if the PSNR is lower (dB)")
    command.add_argument("--json", action="store_true", help="print the comparison as JSON")
