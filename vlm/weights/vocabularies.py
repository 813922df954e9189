"""Tokenizers of public checkpoints, from the files next to the weights."""

import dataclasses
import pathlib
from typing import Any

import tokenizers
from etils import epath
from tokenizers import decoders, models, normalizers, pre_tokenizers

from vlm.config import Clean, ModelConfig, TokenizerConfig
from vlm.errors import CheckpointError, DataError, brief
from vlm.inputs.tokenizer import Tokenizer, read_vocabulary
from vlm.weights import sentencepiece
from vlm.weights.fields import fields, string
from vlm.weights.slow_vocabularies import (
    bert_normalizer,
    class_of_pieces,
    slow_vocabulary,
    wordpiece_lines,
)
from vlm.weights.tokenizer_settings import Settings

CLIP_VOCABULARY = pathlib.Path(__file__).parent / "clip" / "tokenizer.json"
CLIP_BOS, CLIP_EOS, CLIP_SIZE = 49406, 49407, 49408


def clip_tokenizer(
    context_length: int, *, clean: Clean = "clip", keep_eos: bool = True
) -> Tokenizer:
    """Return the tokenizer of OpenAI's CLIP, which is open_clip's `SimpleTokenizer` too."""
    rules = TokenizerConfig(
        context_length=context_length,
        pad_id=0,
        bos_id=CLIP_BOS,
        eos_id=CLIP_EOS,
        clean=clean,
        keep_eos=keep_eos,
        parse_special=True,
    )
    return Tokenizer.from_file(CLIP_VOCABULARY, rules)


# End token by tokenizer class, which adds it without naming it in `tokenizer.json`.
_ENDS = {
    "GemmaTokenizer": "<eos>", "Siglip2Tokenizer": "<eos>", "T5Tokenizer": "</s>",
    "MT5Tokenizer": "</s>",
}  # fmt: skip


def huggingface_tokenizer(
    folder: epath.Path, config: ModelConfig, *, clean: Clean = "none"
) -> Tokenizer:
    """Return the tokenizer that transformers saved in `folder`, with the rules of its class.

    Raises:
        CheckpointError: its files are missing or corrupt, or have a setting that vlm does not
            support.
    """
    settings = Settings.read(folder)
    kind = settings.values.get("tokenizer_class") or ""
    kind = string(kind, f"{settings.file}: tokenizer_class").removesuffix("Fast")
    length = config.text.context_length
    if clean == "none":  # else the length is that of open_clip's text_cfg
        length = settings.context_length(length)
    pieces = folder / "spiece.model"
    if pieces.exists() and not (folder / "tokenizer.json").exists():
        kind = class_of_pieces(folder, kind)
    if kind in ("Siglip", "SiglipTokenizer") and pieces.exists():
        if not settings.flag("do_lower_case"):
            raise CheckpointError(
                f"{settings.file}: do_lower_case is false, and vlm supports only true for SigLIP"
            )
        plain = siglip_tokenizer(pieces, length, clean=clean if clean != "none" else "siglip")
        return _with_named(plain, settings)
    path = folder / "tokenizer.json"
    if path.exists():
        vocabulary = _vocabulary(path)
        if kind == "BertTokenizer":  # its settings override the normaliser of the file
            vocabulary.normalizer = bert_normalizer(settings)
    else:
        vocabulary = slow_vocabulary(folder, kind, settings)
    if "Gemma" in kind or "Siglip2" in kind:
        _lowercase(vocabulary)  # as SigLIP 2 was trained
    settings.add_tokens(vocabulary)
    padding, side = vocabulary.padding, settings.padding_side(kind, vocabulary)
    truncated = settings.truncation_side(vocabulary)
    vocabulary.no_padding()  # saved by a tokenizer that was in use
    vocabulary.no_truncation()
    eos_token = settings.text("eos_token")
    eos = vocabulary.token_to_id(eos_token)
    if vocabulary.post_processor is None and kind in _ENDS:
        name = eos_token or _ENDS[kind]
        token = vocabulary.token_to_id(name)
        if token is None:
            where = f"{settings.file}: eos_token {brief(name)}"
            raise CheckpointError(f"{where} is not in its vocabulary")
        specials = [token]
    else:
        specials = vocabulary.encode("", add_special_tokens=True).ids
    bos_id, eos_id = _ends(specials, eos, folder)
    settings.check_ends(add_bos_token=bos_id is not None, add_eos_token=eos_id is not None)
    pad = settings.token_id("pad_token", vocabulary)
    if pad is None:
        pad = padding["pad_id"] if padding else eos_id
    splits = settings.values.get("split_special_tokens")
    rules = TokenizerConfig(
        context_length=length,
        pad_id=0 if pad is None else pad,
        bos_id=bos_id,
        eos_id=eos_id,
        clean=clean,
        pad_side=side,
        truncation_side=truncated,
        parse_special=not (splits and settings.flag("split_special_tokens")),
    )
    return Tokenizer(vocabulary, rules)


def _with_named(tokenizer: Tokenizer, settings: Settings) -> Tokenizer:
    """Return SigLIP's tokenizer with the tokens and padding side of its settings."""
    vocabulary, rules = tokenizer.vocabulary, tokenizer.config
    pad, eos = (settings.token_id(f"{name}_token", vocabulary) for name in ("pad", "eos"))
    rules = dataclasses.replace(
        rules,
        pad_id=rules.pad_id if pad is None else pad,
        eos_id=rules.eos_id if eos is None else eos,
        pad_side=settings.padding_side("SiglipTokenizer", vocabulary),
        truncation_side=settings.truncation_side(vocabulary),
    )
    settings.check_ends(add_eos_token=rules.eos_id is not None)
    return tokenizer.with_rules(rules)


# Cleaning of open_clip's tokenizers by its name in `tokenizer_kwargs`.
OPEN_CLIP_CLEAN: dict[str, Clean] = {
    "lower": "clip",
    "whitespace": "clip_cased",
    "canonicalize": "clip_canonical",
}


def open_clip_tokenizer(
    folder: epath.Path, values: dict[str, Any], config: ModelConfig
) -> Tokenizer:
    """Return the tokenizer of open_clip's `get_tokenizer` for a `text_cfg`.

    Raises:
        CheckpointError: its files are missing, or it has an option that vlm does not support.
    """
    where = f"{folder}: text_cfg"
    options = dict(fields(values.get("tokenizer_kwargs"), f"{where}.tokenizer_kwargs"))
    name = string(values.get("hf_tokenizer_name") or "", f"{where}.hf_tokenizer_name")
    clean = options.pop("clean", "whitespace" if name else "lower")
    strip = options.pop("strip_sep_token", False)
    options.pop("trust_remote_code", None)
    if options or not isinstance(clean, str) or clean not in OPEN_CLIP_CLEAN:
        raise CheckpointError(
            f"{where}.tokenizer_kwargs is {brief(values['tokenizer_kwargs'])}, and vlm supports "
            f"strip_sep_token, and clean of {', '.join(OPEN_CLIP_CLEAN)}"
        )
    cleaning = OPEN_CLIP_CLEAN[clean]
    if not name:
        return clip_tokenizer(config.text.context_length, clean=cleaning)
    tokenizer = huggingface_tokenizer(folder, config, clean=cleaning)
    if strip:  # the separator: the end token, also if spelled out inside a text
        rules = dataclasses.replace(tokenizer.config, zeroed_id=tokenizer.config.eos_id)
        tokenizer = tokenizer.with_rules(rules)
    return tokenizer


def siglip_tokenizer(
    path: epath.PathLike, context_length: int, *, clean: Clean = "siglip"
) -> Tokenizer:
    """Return a SentencePiece vocabulary with the rules of SigLIP 1: pad and end are "</s>".

    Raises:
        CheckpointError: the file is missing or is not a SentencePiece model.
    """
    # The cleaning "siglip" adds the leading space.
    vocabulary = sentencepiece.read(path, prefix=clean != "siglip")
    end = vocabulary.token_to_id("</s>")
    if end is None:
        raise CheckpointError(
            f"{path} has no token </s>, with which SigLIP ends and pads its texts"
        )
    rules = TokenizerConfig(
        context_length=context_length, pad_id=end, eos_id=end, clean=clean, parse_special=True
    )
    return Tokenizer(vocabulary, rules)


# Files of big_vision's vocabularies by size.
BIG_VISION = {
    32_000: "gs://t5-data/vocabs/cc_en.32000/sentencepiece.model",
    250_000: "gs://t5-data/vocabs/mc4.250000.100extra/sentencepiece.model",
    256_000: "gs://big_vision/gemma_tokenizer.model",
}
_BESIDE = ("sentencepiece.model", "spiece.model", "tokenizer.model", "gemma_tokenizer.model")


def big_vision_tokenizer(folder: epath.Path, config: ModelConfig) -> Tokenizer:
    """Return the tokenizer of the SentencePiece file next to an `.npz`: SigLIP 1's, or Gemma's.

    Raises:
        CheckpointError: there is no file; the message names its source.
    """
    length, size = config.text.context_length, config.text.vocab_size
    path = next((folder / name for name in _BESIDE if (folder / name).exists()), None)
    if path is None:
        where = BIG_VISION.get(size, f"of the {size:,} tokens it was trained with")
        raise CheckpointError(
            f"{folder} has no vocabulary, which big_vision keeps apart: put the SentencePiece file "
            f"{where} beside the .npz as {_BESIDE[0]}"
        )
    vocabulary = sentencepiece.read(path)
    pad, end = vocabulary.token_to_id("<pad>"), vocabulary.token_to_id("<eos>")
    if end is not None:
        if pad is None:
            raise CheckpointError(f"{path} has a token <eos> and no <pad>, which fills short texts")
        rules = TokenizerConfig(context_length=length, pad_id=pad, eos_id=end, lowercase=True)
        return Tokenizer(vocabulary, rules)
    return siglip_tokenizer(path, length, clean="none")


# Context length of all published LiT models; their BERTs have 512 positions.
_BERT_LENGTH = 16
_BERT = "uncased_L-12_H-768_A-12 (github.com/google-research/bert)"


def bert_tokenizer(path: epath.Path, config: ModelConfig) -> Tokenizer:
    """Return the WordPiece tokenizer of the file next to an `.npz`, with rules of `bert_tokenize`.

    A row is [CLS], the text, and zeros; there is no [SEP]. Source:
    big_vision/pp/proj/flaxformer/bert_ops.py, over tensorflow_text's BertTokenizer: see
    `vlm.inputs.cleaning.bert`.

    Raises:
        CheckpointError: there is no file, or it does not match the model.
    """
    # Like the official bucket: LiT-B16B.npz and LiT-B16B.txt.
    names = (f"{path.stem}.txt", "vocab.txt", "tokenizer.json")
    file = next((path.parent / name for name in names if (path.parent / name).exists()), None)
    if file is None:
        raise CheckpointError(
            f"{path.parent} has no vocabulary, which big_vision keeps apart: put the vocab.txt of "
            f"{_BERT} beside the .npz"
        )
    vocab = _wordpiece_json(file) if file.suffix == ".json" else wordpiece_lines(file)
    if missing := [token for token in ("[CLS]", "[UNK]") if token not in vocab]:
        raise CheckpointError(f"{file} has no {missing[0]}: give the vocabulary of a BERT")
    if len(vocab) != config.text.vocab_size:
        raise CheckpointError(
            f"{file} has {len(vocab):,} tokens and the embedding table of {path} "
            f"{config.text.vocab_size:,} rows: they are not of one model"
        )
    model = models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100)
    vocabulary = tokenizers.Tokenizer(model)
    vocabulary.pre_tokenizer = pre_tokenizers.Split(" ", behavior="removed")
    vocabulary.decoder = decoders.WordPiece()
    rules = TokenizerConfig(
        context_length=min(_BERT_LENGTH, config.text.context_length),
        pad_id=0,
        bos_id=vocab["[CLS]"],
        eos_id=None,
        clean="bert",
    )
    return Tokenizer(vocabulary, rules)


def _wordpiece_json(path: epath.Path) -> dict[str, int]:
    """Return the tokens of a `tokenizer.json`, whose rules are not big_vision's."""
    vocabulary = _vocabulary(path)
    if not isinstance(vocabulary.model, models.WordPiece):
        raise CheckpointError(f"{path} is not a WordPiece vocabulary, which BERT needs")
    return vocabulary.get_vocab(with_added_tokens=False)


def _lowercase(vocabulary: tokenizers.Tokenizer) -> None:
    if "Lowercase" in repr(vocabulary.normalizer):
        return
    first = [] if vocabulary.normalizer is None else [vocabulary.normalizer]
    vocabulary.normalizer = normalizers.Sequence([normalizers.Lowercase(), *first])


def _ends(specials: list[int], eos: int | None, where: Any) -> tuple[int | None, int | None]:
    """Return the begin and end ids, from the special tokens of an empty text."""
    if len(specials) == 2:
        return specials[0], specials[1]
    if len(specials) == 1:
        return (None, specials[0]) if eos in (None, specials[0]) else (specials[0], None)
    if not specials:
        return None, None
    raise CheckpointError(f"{where}: its tokenizer adds {len(specials)} special tokens, not 1 or 2")


def _vocabulary(path: epath.Path) -> tokenizers.Tokenizer:
    try:
        return read_vocabulary(path)
    except DataError as error:
        raise CheckpointError(str(error)) from None
