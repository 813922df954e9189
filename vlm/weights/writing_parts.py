"""What folders for other libraries share: a tokenizer that stands alone, JSON, and refusals."""

import json
import string
from collections.abc import Iterable
from typing import Any, NoReturn

import tokenizers
from etils import epath
from tokenizers import Regex, normalizers, processors

from vlm.config import ModelConfig
from vlm.errors import CheckpointError
from vlm.inputs.tokenizer import Tokenizer
from vlm.weights.files import write_safetensors
from vlm.weights.sentencepiece import SPACE


def standalone(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The vocabulary with our rules inside: cleaning as normalisation, and the special tokens.

    The repair of mojibake and HTML entities has no form there, as in transformers' own CLIP, nor
    has what `str.lower` makes of a word's last sigma and of special tokens that are spelled out.

    Raises:
        CheckpointError: the cleaning is BERT's, whose case folding has none either.
    """
    rules, vocabulary = tokenizer.config, tokenizer.vocabulary
    if rules.clean == "bert":
        refuse("tokenizer.json", ["the cleaning 'bert' of the tokenizer"])
    steps = []
    if rules.clean != "none":
        steps = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    if rules.clean in ("siglip", "clip_canonical"):
        marks = "".join("\\" + mark for mark in string.punctuation)
        steps = [normalizers.Replace(Regex(f"[{marks}]"), ""), *steps]
    if rules.lowercase or rules.clean in ("clip", "siglip", "clip_canonical"):
        steps.append(normalizers.Lowercase())
    if rules.clean == "clip":
        steps.insert(0, normalizers.NFC())
    if rules.clean == "siglip":  # which puts this in front, before any vocabulary
        steps.append(normalizers.Prepend(SPACE))
    if steps:
        if vocabulary.normalizer is not None:
            steps.append(vocabulary.normalizer)
        vocabulary.normalizer = normalizers.Sequence(steps)
    names = {i: vocabulary.id_to_token(i) for i in (rules.bos_id, rules.eos_id) if i is not None}
    row = [names.get(i) if i is not None else None for i in (rules.bos_id, rules.eos_id)]
    row.insert(1, "$A")
    vocabulary.post_processor = processors.TemplateProcessing(
        single=" ".join(part for part in row if part),
        special_tokens=[(name, i) for i, name in names.items()],
    )
    return vocabulary


def tokenizer_files(folder: epath.Path, tokenizer: Tokenizer, **more: Any) -> None:
    """`tokenizer.json` that does by itself what our rules do, and its `tokenizer_config.json`.

    The latter has the fields of `more` too.
    """
    rules = tokenizer.config
    vocabulary = standalone(tokenizer)
    (folder / "tokenizer.json").write_text(vocabulary.to_str(pretty=True))
    names = {"bos_token": rules.bos_id, "eos_token": rules.eos_id, "pad_token": rules.pad_id}
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": rules.context_length,
        "padding_side": rules.pad_side,
        **{name: vocabulary.id_to_token(i) for name, i in names.items() if i is not None},
        **more,
    }
    dump(folder / "tokenizer_config.json", about)


def transformers_folder(
    folder: epath.Path,
    config: dict[str, Any],
    preprocess: dict[str, Any],
    tokenizer: Tokenizer,
    tensors: Iterable[tuple[str, Any]],
    **more: Any,
) -> None:
    """The files of a folder of transformers; `more` is for its `tokenizer_config.json`."""
    dump(folder / "config.json", config)
    dump(folder / "preprocessor_config.json", preprocess)
    tokenizer_files(folder, tokenizer, **more)
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})


def check(form: str, config: ModelConfig, vision: dict[str, Any], text: dict[str, Any]) -> None:
    """Refuse a model unless the fields of its towers have these values."""
    found = [
        f"{name}.{field} {getattr(tower, field)!r} ({value!r})"
        for name, tower, fields in (("vision", config.vision, vision), ("text", config.text, text))
        for field, value in fields.items()
        if getattr(tower, field) != value
    ]
    if found:
        refuse(form, found)


KERNELS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # PIL.Image.Resampling
HOLDS = {
    "transformers": "the ViTs of CLIP, SigLIP, Chinese CLIP, AltCLIP and TIPSv2, and ALIGN",
    "open_clip": "CLIP's ViTs and ResNets, timm's image towers, and XLM-R, RoBERTa and NLLB",
}


def refuse(form: str, found: list[str]) -> NoReturn:
    """Raise the CheckpointError that a format has no place for all of `found`."""
    holds = f" ({form} holds {HOLDS[form]})" if form in HOLDS else ""
    raise CheckpointError(
        f"{form} has no place for {', '.join(found)}: save the model as a vlm bundle instead{holds}"
    )


def dump(path: epath.Path, values: dict[str, Any]) -> None:
    """Write a JSON file as both libraries do."""
    path.write_text(json.dumps(values, indent=2) + "\n")
