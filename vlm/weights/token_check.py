"""Comparison of the token ids of an exported folder with those of the original tokenizer."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
from etils import epath
from jaxtyping import Int
from tokenizers import models, normalizers, pre_tokenizers

from vlm.inputs.cleaning import CLEANERS
from vlm.inputs.tokenizer import Tokenizer, read_vocabulary
from vlm.weights.fields import read_json
from vlm.weights.registry import open_checkpoint
from vlm.weights.vocabularies import OPEN_CLIP_CLEAN

SHOWN = 3  # examples in a message


@dataclass(frozen=True)
class TokenCheck:
    """Number of texts whose token ids differ in an exported folder.

    Attributes:
        texts: number of texts compared.
        differ: number of texts whose ids differ.
        reader: library that reads the folder and gets the other ids.
        examples: the shortest such texts, each with both rows of ids.
        note: the reason, if there is one for all.
    """

    texts: int
    differ: int
    reader: str
    examples: tuple[tuple[str, list[int], list[int]], ...] = ()
    note: str = ""

    def __str__(self) -> str:
        if not self.differ:
            return f"token ids are equal for all of {self.texts:,} texts"
        lines = [
            f"token ids differ for {self.differ:,} of {self.texts:,} texts when {self.reader} "
            "reads the folder:"
        ]
        for text, ours, theirs in self.examples:
            at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
            near = slice(max(0, at - 2), at + 4)
            lines.append(
                f"  {text if len(text) <= 60 else text[:60] + '...'!r}: from place {near.start} "
                f"{ours[near]} here, {theirs[near]} there"
            )
        if self.note:
            lines.append(f"  ({self.note})")
        return "\n".join(lines)


def check_tokens(folder: epath.Path, tokenizer: Tokenizer, texts: Sequence[str]) -> TokenCheck:
    """Compare the original tokenizer with the folder as read by vlm and by its own library.

    Raises:
        CheckpointError: vlm cannot read the folder.
    """
    wanted = tokenizer(texts)
    checkpoint = open_checkpoint(folder)
    again = checkpoint.tokenizer
    if (length := checkpoint.context_length) is not None:
        again = again.with_rules(dataclasses.replace(again.config, context_length=length))
    worst = compare_rows("vlm", texts, wanted, again(texts))
    if (folder / "tokenizer.json").exists():
        open_clip = (folder / "open_clip_config.json").exists()
        reader, rows = ("open_clip", _by_open_clip) if open_clip else ("transformers", _rows)
        theirs = compare_rows(reader, texts, wanted, rows(folder, texts))
        if theirs.differ and _is_naflex(folder):
            theirs = dataclasses.replace(theirs, note=_NAFLEX)
        worst = max(worst, theirs, key=lambda check: check.differ)
    return worst


_NAFLEX = (
    "for NaFlex, AutoTokenizer uses the rules of Gemma's tokenizer; PreTrainedTokenizerFast reads "
    "tokenizer.json as it is"
)


def _is_naflex(folder: epath.Path) -> bool:
    config = folder / "config.json"
    return config.exists() and read_json(config).get("model_type") == "siglip2"


def compare_rows(reader: str, texts: Sequence[str], wanted: Any, rows: Any) -> TokenCheck:
    """Compare the `wanted` rows of token ids with those of another reader."""
    length = max(wanted.shape[1], rows.shape[1])
    ours, theirs = (
        np.pad(x, ((0, 0), (0, length - x.shape[1])), constant_values=-1) for x in (wanted, rows)
    )
    differ = np.flatnonzero((ours != theirs).any(axis=1)).tolist()
    differ.sort(key=lambda i: len(texts[i]))  # short texts show a cause best
    examples = [(texts[i], ours[i].tolist(), theirs[i].tolist()) for i in differ[:SHOWN]]
    return TokenCheck(len(texts), len(differ), reader, tuple(examples))


# ----------------------------------------------------------- how other libraries read a folder


def _rows(
    folder: epath.Path, texts: Sequence[str], length: int | None = None
) -> Int[np.ndarray, "n l"]:
    """Return the ids of transformers' `AutoTokenizer`, padded and truncated to one length."""
    about = read_json(folder / "tokenizer_config.json")
    vocabulary = read_vocabulary(folder / "tokenizer.json")
    if _is_naflex(folder):
        vocabulary = _as_siglip2(vocabulary)
    there = {token.content for token in vocabulary.get_added_tokens_decoder().values()}
    names = (about.get(key) for key in ("bos_token", "eos_token", "pad_token"))
    vocabulary.add_special_tokens([name for name in names if name and name not in there])
    vocabulary.encode_special_tokens = about["split_special_tokens"]
    length = int(length or about["model_max_length"])
    vocabulary.enable_truncation(length, direction=about["truncation_side"])
    pad = about["pad_token"]
    vocabulary.enable_padding(
        length=length,
        pad_id=vocabulary.token_to_id(pad),
        pad_token=pad,
        direction=about["padding_side"],
    )
    try:
        encodings = vocabulary.encode_batch_fast(list(texts))
    except Exception:  # the vocabulary lacks tokens of Gemma's rules
        return np.full((len(texts), length), -1)
    return np.array([row.ids for row in encodings])


def _as_siglip2(vocabulary: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Return the vocabulary as built by `Siglip2Tokenizer`, which `AutoTokenizer` uses for NaFlex.

    It keeps the tokens, merges and special tokens of `tokenizer.json`, and has Gemma's rules.
    """
    contents = json.loads(vocabulary.to_str())
    if contents["model"]["type"] != "BPE":
        return vocabulary
    built = tokenizers.Tokenizer(
        models.BPE(
            vocab=contents["model"]["vocab"],
            merges=[tuple(pair) for pair in contents["model"]["merges"]],
            fuse_unk=True,
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    built.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(" ", "▁")]
    )
    built.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    built.post_processor = vocabulary.post_processor
    for token in vocabulary.get_added_tokens_decoder().values():
        (built.add_special_tokens if token.special else built.add_tokens)([token])
    return built


def _by_open_clip(folder: epath.Path, texts: Sequence[str]) -> Int[np.ndarray, "n l"]:
    """Return the ids of open_clip's `HFTokenizer`."""
    text_cfg = read_json(folder / "open_clip_config.json")["model_cfg"]["text_cfg"]
    options = text_cfg["tokenizer_kwargs"]
    clean = CLEANERS[OPEN_CLIP_CLEAN[options["clean"]]]
    rows = _rows(folder, [clean(text) for text in texts], text_cfg["context_length"])
    if options.get("strip_sep_token"):
        about = read_json(folder / "tokenizer_config.json")
        vocabulary = read_vocabulary(folder / "tokenizer.json")
        rows[rows == vocabulary.token_to_id(about["sep_token"])] = 0
    return rows
