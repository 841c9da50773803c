"""Weighted and long prompts: the notation, the closed form of what they mean, and the same on every engine."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from exported import FORMATS, exported
from numpy.typing import NDArray
from parity import IMAGE_BOUND

from anamorph import DiffusionPipeline, StableDiffusionPipeline
from anamorph.errors import InputError
from anamorph.pipelines.wording import MORE, Wording, emphases, read

LONG = "a red cat of " * 12 + "a photo of dogs of " * 12 + "the end"
WEIGHED = "a (red:1.5) cat, [photo] of ((dogs))"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat", [("a cat", 1)]),
        ("", []),
        ("a (cat)", [("a ", 1), ("cat", MORE)]),
        ("a ((cat)) b", [("a ", 1), ("cat", MORE**2), (" b", 1)]),
        ("[cat]", [("cat", 1 / MORE)]),
        ("(cat:1.3)", [("cat", 1.3)]),
        ("(cat: .5 )x", [("cat", 0.5), ("x", 1)]),
        ("(a (b:2) c:3)", [("a ", 3), ("b", 6), (" c", 3)]),
        ("[a (b)]", [("a ", 1 / MORE), ("b", 1)]),
        (r"\(a\) \[b\] \\c", [(r"(a) [b] \c", 1)]),
        ("a: b", [("a: b", 1)]),
        ("(a:b)", [("a:b", MORE)]),
        ("(open", [("open", MORE)]),
        ("a) b]", [("a) b]", 1)]),
        ("(a]b)", [("a]b", MORE)]),
    ],
)
def test_the_notation(prompt: str, expected: list[tuple[str, float]]) -> None:
    found = emphases(prompt)
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert np.allclose([weight for _, weight in found], [weight for _, weight in expected], rtol=1e-12)


class Reference:
    """transformers' encoder, and the definition: chunks on their own, states times weights, each chunk's mean kept."""

    def __init__(self, folder: Path) -> None:
        self.model = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
        self.tokenizer: Any = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")

    def __call__(self, runs: list[tuple[str, float]]) -> NDArray[Any]:
        words = [(index, weight) for text, weight in runs
                 for index in self.tokenizer(text, add_special_tokens=False).input_ids]  # fmt: skip
        chunks = []
        for begin in range(0, max(len(words), 1), 75):
            part = words[begin : begin + 75]
            room = [(self.tokenizer.pad_token_id, 1.0)] * (75 - len(part))
            whole = [(self.tokenizer.bos_token_id, 1.0), *part, (self.tokenizer.eos_token_id, 1.0), *room]
            with torch.no_grad():
                z = self.model(torch.tensor([[index for index, _ in whole]])).last_hidden_state.double()
            weighted = z * torch.tensor([weight for _, weight in whole], dtype=torch.float64)[None, :, None]
            chunks.append(weighted * z.mean() / weighted.mean())
        return torch.cat(chunks, 1).numpy()


def encoded(pipe: Any, prompt: str, **options: Any) -> NDArray[Any]:
    """What the denoiser is told of a prompt alone."""
    plan = pipe.plan(pipe.job(prompt, guidance_scale=1.0, num_inference_steps=2, seed=0, **options))
    states: NDArray[Any] = np.asarray(plan.conditions["encoder_hidden_states"])
    return states


@pytest.mark.parametrize("engine", ["eager", *FORMATS])
def test_states_are_those_of_the_definition(sd1: Path, engine: str) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(
        sd1 if engine == "eager" else exported(sd1, engine), backend={"default": engine}
    )
    reference = Reference(sd1)
    assert isinstance(pipe, StableDiffusionPipeline)
    pairs = [
        (encoded(pipe, WEIGHED, prompt_weighting=True), reference(emphases(WEIGHED))),
        (encoded(pipe, LONG, long_prompts=True), reference([(LONG, 1.0)])),
        (encoded(pipe, f"({LONG}:0.7) cat", long_prompts=True, prompt_weighting=True),
         reference([(LONG, 0.7), (" cat", 1.0)])),
    ]  # fmt: skip
    for ours, expected in pairs:
        assert ours.shape == expected.shape
        assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()
    assert pairs[1][0].shape[1] > 77
    plain = encoded(pipe, WEIGHED)
    assert np.abs(pairs[0][0] - plain).max() > 0.01 * np.abs(plain).max()


BREAKS: list[tuple[str, list[list[tuple[str, float]]]]] = [
    ("a cat BREAK red dog", [[("a cat", 1.0)], [("red dog", 1.0)]]),
    ("a cat\nBREAK\n", [[("a cat", 1.0)]]),
    ("a cat BREAK BREAK", [[("a cat", 1.0)], [("", 1.0)]]),
    ("BREAK a (red BREAK dog:1.3)", [[("", 1.0)], [("a ", 1.0), ("red", 1.3)], [("dog", 1.3)]]),
    ("a BREAKING cat, break", [[("a BREAKING cat, break", 1.0)]]),
]


@pytest.mark.parametrize(("prompt", "chunks"), BREAKS, ids=[repr(prompt) for prompt, _ in BREAKS])
def test_a_break_fills_a_chunk_up(sd1: Path, prompt: str, chunks: list[list[tuple[str, float]]]) -> None:
    pipe: Any = StableDiffusionPipeline.from_pretrained(sd1, backend="eager")
    reference = Reference(sd1)
    expected = np.concatenate([reference(chunk) for chunk in chunks], axis=1)
    found = encoded(pipe, prompt, long_prompts=True, prompt_weighting=True)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    assert encoded(pipe, prompt, prompt_weighting=True).shape[1] == 77  # a word like others, where there is one chunk


COMMA = (1, ",")
COMMAS: list[tuple[list[tuple[int, str]], list[int]]] = [
    ([(60, "a"), COMMA, (20, "cat")], [61, 20]),
    ([(55, "a"), COMMA, (20, "cat")], [56, 20]),  # the comma is the first of twenty
    ([(54, "a"), COMMA, (30, "cat")], [75, 10]),  # it is one too far
    ([(74, "a"), COMMA, (5, "cat")], [75, 5]),
    ([(70, "a"), COMMA, (4, "cat"), COMMA, (5, "dog")], [75, 6]),  # a comma comes next, and begins the next chunk
    ([(58, "a"), COMMA, (9, "dog"), COMMA, (10, "cat")], [69, 10]),  # the last one counts
    ([(60, "a"), COMMA, (60, "cat"), COMMA, (30, "dog")], [61, 61, 30]),
    ([(60, "a"), COMMA, (14, "cat")], [75]),
    ([(75, "a"), (75, "cat"), (1, "dog")], [75, 75, 1]),
    ([(60, "a"), COMMA, (5, "BREAK"), (20, "cat")], [61, 0, 0, 0, 0, 20]),
]
"""Words, each so often, and how many tokens each chunk gets."""


@pytest.mark.parametrize(("runs", "counts"), COMMAS)
def test_full_chunks_end_behind_a_comma(sd1: Path, runs: list[tuple[int, str]], counts: list[int]) -> None:
    tokenizer = DiffusionPipeline.from_pretrained(sd1, backend="null").tokenizer
    words = [word for count, text in runs for word in [text] * count]
    tokens = read(tokenizer, [" ".join(words)], Wording(long=True))
    expected = iter(tokenizer.words(word)[0][0] for word in words if word != "BREAK")
    assert tokens.ids.shape[1] == len(counts)
    for ids, count in zip(tokens.ids[0], counts, strict=True):
        assert ids[0] == tokenizer.bos_token_id
        assert ids[1 : 1 + count].tolist() == [next(expected) for _ in range(count)]
        assert ids[1 + count] == tokenizer.eos_token_id
    assert next(expected, None) is None


def test_weights_move_on_with_their_words(sd1: Path) -> None:
    tokenizer = DiffusionPipeline.from_pretrained(sd1, backend="null").tokenizer
    prompt = "a " * 60 + "(dog, " + "cat " * 10 + "red:1.5) " + "of " * 10
    tokens = read(tokenizer, [prompt], Wording(weighted=True, long=True))
    assert tokens.weights[0, 0].tolist() == [1.0] * 61 + [1.5] * 2 + [1.0] * 14
    assert tokens.weights[0, 1].tolist() == [1.0] + [1.5] * 11 + [1.0] * 65
    cut = read(tokenizer, [prompt], Wording(weighted=True))  # one chunk is as full as it can be
    assert cut.weights[0, 0].tolist() == [1.0] * 61 + [1.5] * 13 + [1.0] * 3


@pytest.mark.parametrize(("prompt", "negative"), [(LONG, "blue"), ("blue", LONG), (LONG, LONG + LONG)])
def test_both_branches_get_as_many_chunks_and_draw_what_diffusers_draws(sd1: Path, prompt: str, negative: str) -> None:
    reference = Reference(sd1)
    states = {"prompt_embeds": reference([(prompt, 1.0)]), "negative_prompt_embeds": reference([(negative, 1.0)])}
    longest = max(value.shape[1] for value in states.values())
    empty = reference([("", 1.0)])
    for name, value in states.items():
        states[name] = np.concatenate([value, *[empty] * ((longest - value.shape[1]) // 77)], axis=1)
    theirs: Any = diffusers.StableDiffusionPipeline.from_pretrained(sd1, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np"}
    embeds = {name: torch.from_numpy(value).float() for name, value in states.items()}
    expected = theirs(**embeds, generator=torch.Generator().manual_seed(3), **call).images
    ours: Any = StableDiffusionPipeline.from_pretrained(sd1, backend="eager")
    generator = torch.Generator().manual_seed(3)
    drawn = ours(prompt, negative_prompt=negative, long_prompts=True, generator=generator, **call).images
    assert np.abs(drawn - expected).max() <= IMAGE_BOUND
    with pytest.warns(UserWarning, match=r"this was cut off: .*; long_prompts=True takes it all"):
        cut = ours(prompt, negative_prompt=negative, generator=torch.Generator().manual_seed(3), **call).images
    assert np.abs(cut - expected).max() > 10 * IMAGE_BOUND


def test_prompts_of_a_list_are_padded_to_the_longest(sd1: Path) -> None:
    tokenizer = DiffusionPipeline.from_pretrained(sd1, backend="null").tokenizer
    tokens = read(tokenizer, ["a cat", LONG, ""], Wording(long=True))
    alone = read(tokenizer, ["a cat"], Wording(long=True))
    assert tokens.ids.shape == (3, 2, 77)
    assert np.array_equal(tokens.ids[:1, :1], alone.ids)
    assert np.array_equal(tokens.ids[0, 1], tokenizer([""]).input_ids[0])
    assert np.array_equal(alone.ids[:, 0], tokenizer(["a cat"]).input_ids)
    assert tokens.cut == ("", "", "")
    weighed = read(tokenizer, [f"({LONG})"], Wording(weighted=True))
    assert weighed.ids.shape == (1, 1, 77)
    assert LONG.endswith(weighed.cut[0])
    assert np.array_equal(weighed.ids[0], tokenizer([LONG]).input_ids)


def test_the_request_records_how_prompts_were_read(sd1: Path) -> None:
    pipe: Any = StableDiffusionPipeline.from_pretrained(sd1, backend="null")
    job = pipe.job(WEIGHED, prompt_weighting=True, long_prompts=True, seed=1)
    assert {"prompt_weighting": True, "long_prompts": True}.items() <= job.request.to_dict().items()
    assert not {"prompt_weighting", "long_prompts"} & set(pipe.job("a cat", seed=1).request.to_dict())
    embeds = np.zeros((1, 80, 32), np.float32)
    with pytest.raises(InputError, match="the prompts have 80 and 77 tokens, expected as many"):
        pipe(prompt_embeds=embeds, num_inference_steps=1)
