"""The arguments of all pipelines, declared once: names, types and meanings here, order and defaults in each class."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, TypedDict, TypeVar, get_args

Texts = str | Sequence[str] | None
Size = tuple[int, int] | None
StepCallback = Callable[[Any, int, float, dict[str, Any]], Mapping[str, Any] | None]
Function = TypeVar("Function", bound=Callable[..., Any])


class Arguments(TypedDict, total=False):
    """Every argument of every pipeline, with what it means."""

    prompt: Annotated[Texts, "what to draw: a text, or one for each picture"]
    prompt_2: Annotated[Texts, "the text for the second encoder; None: `prompt`"]
    image: Annotated[Any, "the picture to start from: Pillow, NumPy [H, W, C] or torch [C, H, W] in 0..1, a batch or "
                          "a list of those, or latents"]  # fmt: skip
    control_image: Annotated[Any, "the picture that a ControlNet follows, in the same forms; a list for several nets"]
    controlnet_conditioning_scale: Annotated[float | Sequence[float], "weight of what a ControlNet adds; one for all, "
                                                                      "or one for each"]  # fmt: skip
    control_mode: Annotated[int | Sequence[int] | None, "the number of each control picture's kind, as the net counts "
                                                        "them"]  # fmt: skip
    guess_mode: Annotated[bool, "whether ControlNets see the prompt's branch alone and add little to early states"]
    adapter_conditioning_scale: Annotated[float | Sequence[float], "weight of what a T2I-Adapter adds; one for all, or "
                                                                   "one for each"]  # fmt: skip
    adapter_conditioning_factor: Annotated[float, "0..1 of the steps: until where T2I-Adapters count"]
    control_guidance_start: Annotated[float | Sequence[float], "0..1 of the steps: where ControlNets begin to count"]
    control_guidance_end: Annotated[float | Sequence[float], "0..1 of the steps: where they cease to"]
    mask_image: Annotated[Any, "at least 0.5 where something is to be drawn; of the picture's size"]
    masked_image_latents: Annotated[Any, "the encoded picture without what is to be drawn, [B, c, h, w]"]
    depth_map: Annotated[Any, "depths [H, W] or [B, H, W] of the picture, near or far of any unit, larger is nearer"]
    class_labels: Annotated[Sequence[int] | int | None, "the class of each picture"]
    batch_size: Annotated[int, "how many pictures"]
    height: Annotated[int | None, "pixels; None: the model's own size"]
    width: Annotated[int | None, "pixels; None: the model's own size"]
    padding_mask_crop: Annotated[int | None, "draw the region around the mask with so many pixels of surroundings, "
                                             "and put it back"]  # fmt: skip
    strength: Annotated[float | None, "0..1: how much of the way from noise the picture goes"]
    num_inference_steps: Annotated[int | None, "steps of the scheduler; unless `timesteps` or `sigmas` are given"]
    original_inference_steps: Annotated[int | None, "steps of the schedule that a distilled model learned from; None: "
                                                    "the scheduler's"]  # fmt: skip
    timesteps: Annotated[Sequence[int] | None, "training timesteps of your own, falling"]
    sigmas: Annotated[Sequence[float] | None, "noise levels of your own, falling"]
    denoising_start: Annotated[float | None, "0..1: how much of the way another pipeline has gone; `image` is what it "
                                             "left, and `strength` does not count"]  # fmt: skip
    denoising_end: Annotated[float | None, "0..1: how much of the way this pipeline goes"]
    guidance_scale: Annotated[float, "s of classifier-free guidance; at 1 and below no other branch is computed"]
    image_guidance_scale: Annotated[float, "how close to the given picture; 1 and above"]
    noise_level: Annotated[int, "training timestep up to which the given picture is noised"]
    negative_prompt: Annotated[Texts, "what to keep away from: a text for all, or one for each prompt"]
    negative_prompt_2: Annotated[Texts, "the negative text for the second encoder; None: `negative_prompt`"]
    num_images_per_prompt: Annotated[int, "pictures of each prompt, side by side"]
    eta: Annotated[float, "0..1: noise of DDIM's steps"]
    use_clipped_model_output: Annotated[bool | None, "whether DDIM takes the noise from the clipped estimate"]
    generator: Annotated[Any, "torch.Generator, or one for each picture, instead of `seed`"]
    latents: Annotated[Any, "the first latents [N, c, h, w], instead of drawn ones"]
    prompt_embeds: Annotated[Any, "encoded prompts [P, S, D], instead of `prompt`"]
    negative_prompt_embeds: Annotated[Any, "encoded negative prompts [P, S, D]"]
    pooled_prompt_embeds: Annotated[Any, "pooled prompts [P, E], beside `prompt_embeds`"]
    negative_pooled_prompt_embeds: Annotated[Any, "pooled negative prompts [P, E]"]
    ip_adapter_image: Annotated[Any, "the picture that an IP-Adapter looks at, or a list with one picture (or list of "
                                     "pictures) for each adapter"]  # fmt: skip
    ip_adapter_image_embeds: Annotated[Any, "encoded pictures instead: for each adapter [1, pictures, E], with "
                                            "guidance [2, pictures, E], the negative ones first"]  # fmt: skip
    output_type: Annotated[str, '"pil", "np" [N, H, W, C] or "pt" [N, C, H, W] in 0..1, or "latent" [N, c, h, w]']
    return_dict: Annotated[bool, "False: a tuple instead of an object with `.images`"]
    cross_attention_kwargs: Annotated[Mapping[str, Any] | None, "scale: how much adapters (LoRA) count in this call; "
                                                                "ip_adapter_masks: for each adapter where its pictures "
                                                                "count, [1, pictures, H, W] of 0 and 1"]  # fmt: skip
    guidance_rescale: Annotated[float, "0..1: how much of the guided output gets the unguided one's deviation"]
    guidance_interval: Annotated[Sequence[float] | None, "start and end, 0..1 of the steps: no other branch is "
                                                         "computed outside; None: guided throughout"]  # fmt: skip
    step_caching: Annotated[float | None, "steps from one full call to the next, or, below 1, the change of samples "
                                          "that asks for one; others compute the last layer alone"]  # fmt: skip
    original_size: Annotated[Size, "what the model is told of the original's height and width; None: those drawn"]
    crops_coords_top_left: Annotated[Size, "what it is told of the top and left that were cut off"]
    target_size: Annotated[Size, "what it is told of the height and width to be seen; None: those drawn"]
    negative_original_size: Annotated[Size, "`original_size` of the other branch"]
    negative_crops_coords_top_left: Annotated[Size, "`crops_coords_top_left` of the other branch"]
    negative_target_size: Annotated[Size, "`target_size` of the other branch"]
    aesthetic_score: Annotated[float, "what a refiner is told of the picture's beauty"]
    negative_aesthetic_score: Annotated[float, "`aesthetic_score` of the other branch"]
    clip_skip: Annotated[int | None, "last layers of the text encoder that are left out"]
    callback_on_step_end: Annotated[StepCallback | None, "called as (pipeline, step, timestep, values) after each "
                                                         "step; what it returns replaces values"]  # fmt: skip
    callback_on_step_end_tensor_inputs: Annotated[Sequence[str], "the values that the callback gets"]
    prompt_weighting: Annotated[bool | None, "whether brackets weigh words: (more), [less], (by:1.3)"]
    long_prompts: Annotated[bool | None, "whether prompts beyond the encoder's length are encoded in chunks, not cut"]
    seed: Annotated[int | Sequence[int] | None, "one number, which counts up from picture to picture, or one for each"]


DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "num_inference_steps": 50,
        "guidance_scale": 7.5,
        "batch_size": 1,
        "num_images_per_prompt": 1,
        "eta": 0.0,
        "output_type": "pil",
        "return_dict": True,
        "guidance_rescale": 0.0,
        "controlnet_conditioning_scale": 1.0,
        "guess_mode": False,
        "adapter_conditioning_scale": 1.0,
        "adapter_conditioning_factor": 1.0,
        "control_guidance_start": 0.0,
        "control_guidance_end": 1.0,
        "crops_coords_top_left": (0, 0),
        "negative_crops_coords_top_left": (0, 0),
        "aesthetic_score": 6.0,
        "negative_aesthetic_score": 2.5,
        "callback_on_step_end_tensor_inputs": ("latents",),
    }
)
"""Where the default is not None and a class says nothing else."""

OUTPUT = ("output_type", "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs")
"""What concerns a call as a whole, and not its steps."""


@dataclass(frozen=True)
class Signature:
    """The arguments that a pipeline takes: those that have a position, those by name only, and its own defaults."""

    names: tuple[str, ...]
    by_name: tuple[str, ...]
    defaults: Mapping[str, Any]

    @classmethod
    def of(cls, names: str, **defaults: Any) -> "Signature":
        """From names with blanks between them, in diffusers' order; those after a star have no position."""
        positional, _, by_name = names.partition("*")
        own = cls(tuple(positional.split()), tuple(by_name.split()), MappingProxyType(defaults))
        assert set(own.all) | set(defaults) <= set(Arguments.__annotations__), "an argument is declared nowhere"
        return own

    @property
    def all(self) -> tuple[str, ...]:
        """Every name that is taken."""
        return (*self.names, *self.by_name)

    @property
    def quiet(self) -> "Signature":
        """The same without what concerns a call as a whole."""
        names = tuple(name for name in self.names if name not in OUTPUT)
        return Signature(names, self.by_name, self.defaults)

    def default(self, name: str) -> Any:
        """What counts where nothing is given."""
        return self.defaults.get(name, DEFAULTS.get(name))

    def bind(self, owner: str, positional: Sequence[Any], named: Mapping[str, Any]) -> Arguments:
        """Every argument by name, with defaults also for those that `owner` does not take.

        Raises TypeError: a strange name, one given twice, or too many by position.
        """
        if strange := [name for name in named if name not in self.all]:
            raise TypeError(f"{owner} takes no argument {strange[0]!r}; it takes {', '.join(self.all)}")
        if len(positional) > len(self.names):
            raise TypeError(f"{owner} takes {len(self.names)} arguments by position, got {len(positional)}")
        placed = dict(zip(self.names, positional, strict=False))
        if twice := [name for name in named if name in placed]:
            raise TypeError(f"{owner} got {twice[0]!r} by position and by name; give it once")
        given = {**placed, **named}
        if given.get("num_inference_steps") is None:
            own = any(given.get(name) is not None for name in ("timesteps", "sigmas"))
            given["num_inference_steps"] = None if own else self.default("num_inference_steps")
        bound: Arguments = {**{name: self.default(name) for name in Arguments.__annotations__}, **given}  # type: ignore[typeddict-item]
        return bound

    @property
    def parameters(self) -> list[inspect.Parameter]:
        """As the inspect module describes them."""
        placed, named = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
        return [
            inspect.Parameter(
                name, named if name in self.by_name else placed,
                default=self.default(name), annotation=get_args(_declared(name))[0],
            )
            for name in self.all
        ]  # fmt: skip

    def announced(self, function: Function) -> Function:
        """A method that shows these arguments, with their meanings, to `help`, `inspect` and editors."""
        function = inspect.unwrap(function)  # a subclass of a pipeline shows its own arguments alone

        @functools.wraps(function)
        def shown(*given: Any, **named: Any) -> Any:
            return function(*given, **named)

        me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        returned = inspect.signature(function).return_annotation
        meanings = "\n".join(f"    {name}: {get_args(_declared(name))[1]}" for name in self.all)
        shown.__signature__ = inspect.Signature([me, *self.parameters], return_annotation=returned)  # type: ignore[attr-defined]
        shown.__doc__ = f"{inspect.getdoc(function)}\n\nArguments:\n{meanings}\n"
        return shown  # type: ignore[return-value]


def _declared(name: str) -> Any:
    return Arguments.__annotations__[name]
