"""CLIP's tokenizer as an OpenVINO graph, which openvino-genai runs in place of the vocabulary files."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from anamorph.tokenizer import ClipTokenizer

FILE = "openvino_tokenizer.xml"
PACKAGE = "openvino_tokenizers"
UNPADDED = -1
"""The graph pads texts only to the longest one of a call: its readers pad to the text encoder's length themselves."""


def unavailable() -> str | None:
    """None, or what is missing."""
    if importlib.util.find_spec(PACKAGE):
        return None
    return "openvino-tokenizers is not installed; run: pip install 'anamorph[interop]'"


def write(tokenizer: ClipTokenizer, folder: Path) -> None:
    """Write `openvino_tokenizer.xml` and `.bin`: texts [N] -> `input_ids` and `attention_mask` [N, S], int64.

    Long texts are cut to the tokenizer's length, begin and end tokens stay.
    """
    import openvino
    from openvino_tokenizers.tokenizer_pipeline import TokenizerPipeline

    pipeline = TokenizerPipeline()
    pipeline.add_steps(_steps(tokenizer))
    model = pipeline.get_tokenizer_ov_subgraph()
    types = openvino.preprocess.PrePostProcessor(model)
    for index in range(len(model.outputs)):
        types.output(index).tensor().set_element_type(openvino.Type.i64)
    model = types.build()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        model.set_rt_info(getattr(tokenizer, name), name)
    folder.mkdir(parents=True, exist_ok=True)
    openvino.save_model(model, folder / FILE, compress_to_fp16=False)


def _steps(tokenizer: ClipTokenizer) -> list[Any]:
    """What `ClipTokenizer` does, in the package's terms.

    The package folds case instead of writing lower case, which differs for some 200 characters (Cherokee letters,
    the micro sign, the final sigma), and it writes `</w>` after a special token that stands in the text itself.
    """
    from openvino_tokenizers import tokenizer_pipeline as package

    written = json.loads(tokenizer.to_json())
    added = written["added_tokens"]
    space = written["normalizer"]["normalizers"][1]
    words = written["pre_tokenizer"]["pretokenizers"][0]
    ends = package.CombineSegmentsStep.from_hf_json_roberta_processor(written["post_processor"])
    return [
        package.SpecialTokensSplit(
            [package.SpecialToken(token["content"], token["lstrip"], token["rstrip"]) for token in added]
        ),
        package.NormalizeUnicode("NFC"),
        package.RegexNormalizationStep(space["pattern"]["Regex"], space["content"]),
        package.CaseFoldStep(),
        package.RegexSplitStep(words["pattern"]["Regex"], invert=words["invert"], behaviour="remove"),
        package.BytesToCharsStep(),
        package.BPETokenizationStep.from_hf_json(written),
        package.TruncationStep(tokenizer.model_max_length - ends.number_of_added_tokens, truncation=True),
        ends,
        package.PaddingStep(
            tokenizer.special["pad_token"], tokenizer.pad_token_id, max_length=UNPADDED, pad_to_max_length=False
        ),
    ]
