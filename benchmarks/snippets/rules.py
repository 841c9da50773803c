"""What is changed in snippets before they run, and which are left out: each as data, with its reason."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from anamorph.benchmarks.snippets.reading import Block

CHAPTERS = (
    "quicktour", "stable_diffusion", "loading", "schedulers", "write_own_pipeline", "img2img", "inpaint", "depth2img",
    "conditional_image_generation", "unconditional_image_generation", "stable_diffusion_xl", "sdxl_turbo",
    "textual_inversion_inference", "other-formats", "custom_pipeline_overview", "fp16", "torch2.0", "controlnet",
)  # fmt: skip
"""The chapters on inference with the Stable Diffusion family, and that on training nets, which ends with a picture."""
PYTHON, DIFF = ("py", "python"), "diff"
SHELL = ("bash", "sh", "shell")


@dataclass(frozen=True)
class Rule:
    """An adaptation: `pattern` becomes `replacement`, in the named chapters or all, for one library or both."""

    name: str
    why: str
    pattern: str
    replacement: str
    chapters: tuple[str, ...] = ()
    library: str | None = None
    only_on_cpu: bool = False

    def applied(self, code: str) -> str:
        """The code with every occurrence replaced."""
        return re.sub(self.pattern, self.replacement, code, flags=re.MULTILINE)


@dataclass(frozen=True)
class Omission:
    """Blocks that are left out: those in which `pattern` is found, in the named chapters or all."""

    pattern: str
    why: str
    chapters: tuple[str, ...] = ()


RULES = (
    Rule("library", "diffusers is replaced in imports",
         r"^(\s*)(from|import) diffusers\b", r"\1\2 anamorph", library="anamorph"),
    Rule("processor", "there is no CUDA device: everything runs on the processor",
         r"""(["'])cuda\1""", '"cpu"', only_on_cpu=True),
    Rule("float32", "the processor has no useful kernels for float16",
         r"\btorch\.float16\b", "torch.float32", only_on_cpu=True),
    Rule("no queue", "a processor has no queue of kernels to wait for",
         r"\btorch\.cuda\.synchronize\(\)", "None", only_on_cpu=True),
    Rule("traced, not compiled", "torch.compile still has to trace the model; the C++ compiler would take minutes",
         r'mode="reduce-overhead"', 'backend="eager"', only_on_cpu=True),
    Rule("printed result", "below the code stands what it prints",
         r"^\[\n    diffusers\.schedulers\.(?:.*\n)*?\]$", "", ("stable_diffusion",)),
    Rule("mark of quotation", "a line of code begins with the mark of a quotation",
         r"^> ", "", ("write_own_pipeline",)),
    Rule("one name", "the chapter calls its pipeline by two names",
         r"\bpipe\(", "pipeline(", ("inpaint", "textual_inversion_inference")),
    Rule("one name", "the chapter calls its pipeline by two names",
         r"\bpipe\.", "pipeline_text2image.", ("sdxl_turbo",)),
    Rule("placeholder", "three dots stand for a checkpoint",
         r"from_pretrained\(\.\.\.,", 'from_pretrained("stabilityai/stable-diffusion-xl-base-1.0",',
         ("stable_diffusion_xl",)),
    Rule("name of the variant", "on the hub the file is called non_ema",
         r'variant="non-ema"', 'variant="non_ema"', ("loading",)),
    Rule("where to save", "the chapter loads from the folder beside the one that it saves into",
         r'save_pretrained\("stable-diffusion-v1-5/stable-diffusion-v1-5"',
         'save_pretrained("./stable-diffusion-v1-5"', ("loading",)),
    Rule("placeholder", "words stand for the checkpoints",
         r'"path to model"', '"stable-diffusion-v1-5/stable-diffusion-v1-5"', ("controlnet",)),
    Rule("placeholder", "words stand for the checkpoints",
         r'"path to controlnet"', '"lllyasviel/sd-controlnet-canny"', ("controlnet",)),
    Rule("no xformers", "the comment above says to leave the line out where xformers is not installed",
         r"^pipe\.enable_xformers_memory_efficient_attention\(\)$", "", ("controlnet",), only_on_cpu=True),
    Rule("trusted file", "code of strangers is downloaded, read and then trusted by both libraries",
         r'custom_pipeline="hf-internal-testing/diffusers-dummy-pipeline"',
         'custom_pipeline="./diffusers-dummy-pipeline/pipeline.py", trust_remote_code=True',
         ("custom_pipeline_overview",)),
)  # fmt: skip

LEFT_OUT = (
    Omission(r"\A(?:\s*(?:#.*)?\n?)*\Z", "holds comments alone"),
    Omission(r"\bFlax\w+|\bimport jax\b", "Flax, which diffusers itself does not have any more"),
    Omission(r"DeepFloyd/IF", "DeepFloyd IF, a family of its own"),
    Omission(r"\bimport write_basic_config\b", "prepares a training"),
    Omission(r'custom_pipeline="clip_guided_stable_diffusion"',
             "code from diffusers' repository on GitHub, which is no part of any checkpoint"),
    Omission(r"\A\s*from huggingface_hub import notebook_login\s+notebook_login\(\)\s*\Z",
             "asks for a password and does nothing else"),
    Omission(r"\A\s*CLIPTokenizer\(\n", "shows what is printed"),
)  # fmt: skip

GIVEN: Mapping[str, str] = {
    "loading": "import torch",
    "fp16": "from diffusers import StableDiffusionPipeline",
    "stable_diffusion_xl": "from diffusers import StableDiffusionXLPipeline\nuse_refiner = True",
    "torch2.0": "steps, batch_size = 2, 1",
}
"""Chapter -> what binds the names that its snippets use and never bind."""
FILES: Mapping[str, Mapping[str, str]] = {
    "stable_diffusion_xl": {
        name: f"stabilityai/stable-diffusion-xl-{kind}-1.0/{name}"
        for kind, name in (("base", "sd_xl_base_1.0.safetensors"), ("refiner", "sd_xl_refiner_1.0.safetensors"))
    },
    "other-formats": {"howls_moving_castle.safetensors": "civitai/models-19998/howls_moving_castle.safetensors"},
    "controlnet": {"conditioning_image_1.png": "lllyasviel/sd-controlnet-canny/conditioning_image_1.png"},
    "custom_pipeline_overview": {"diffusers-dummy-pipeline": "hf-internal-testing/diffusers-dummy-pipeline/{library}"},
}
"""Chapter -> what lies in its working folder: name -> hub id, or a file of one."""
CLONE = re.compile(r"git clone https://huggingface\.co/(?P<id>(?P<owner>[\w.-]+)/(?P<name>[\w.-]+))")
"""A shell command that leaves a checkpoint in the working folder."""


def why_left_out(block: Block) -> str | None:
    """The reason for leaving a block out, or None."""
    first = block.language.split(" ")[0]
    if first in SHELL:
        return "a command for the shell (cloned checkpoints lie in the working folder)"
    if first not in (*PYTHON, DIFF) or block.language.endswith(" out"):
        return "shows what is printed"
    for omission in LEFT_OUT:
        here = not omission.chapters or block.chapter in omission.chapters
        if here and re.search(omission.pattern, block.code):
            return omission.why
    return None


def adapted(block: Block, library: str, device: str = "cpu") -> tuple[str, list[Rule]]:
    """The code as it runs with a library on a device, and the rules that changed it."""
    code, used = _added(block.code) if block.language == DIFF else block.code, list[Rule]()
    for rule in rules_for(block.chapter, library, device):
        changed = rule.applied(code)
        if changed != code:
            code = changed
            used.append(rule)
    return code, used


def rules_for(chapter: str, library: str, device: str = "cpu") -> list[Rule]:
    """The rules that hold there."""
    return [
        rule for rule in RULES
        if (not rule.chapters or chapter in rule.chapters)
        and rule.library in (None, library)
        and not (rule.only_on_cpu and device != "cpu")
    ]  # fmt: skip


def given(chapter: str, library: str) -> str:
    """What is run before a chapter's first block."""
    code = GIVEN.get(chapter, "")
    for rule in RULES:
        if rule.name == "library" and rule.library == library:
            code = rule.applied(code)
    return code


def clones(found: Sequence[Block]) -> dict[str, str]:
    """What the shell commands of a chapter leave in the working folder: name -> hub id."""
    shell = [block.code for block in found if block.language.split(" ")[0] in SHELL]
    return {match["name"]: match["id"] for code in shell for match in CLONE.finditer(code)}


def _added(code: str) -> str:
    """What a difference leaves: its common and its new lines."""
    kept = [line for line in code.splitlines() if not line.startswith("-")]
    return "\n".join(line[1:].removeprefix(" ") if line.startswith("+") else line for line in kept)
