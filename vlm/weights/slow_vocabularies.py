"""Vocabularies of transformers from the files of its older ("slow") tokenizer classes.

A folder without `tokenizer.json` has one of these: a SentencePiece model, `vocab.txt` of BERT, or
`vocab.json` and `merges.txt` of CLIP, RoBERTa and their kin.
"""

from typing import Any

import tokenizers
from etils import epath
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from vlm.errors import CheckpointError, brief
from vlm.weights import sentencepiece
from vlm.weights.fields import boolean, read_json
from vlm.weights.tokenizer_settings import Settings

# Classes that are read from each kind of file; "" is a folder that names none.
_FROM_PIECES = ("", "XLMRobertaTokenizer")
_FROM_SPIECE = (
    "T5Tokenizer", "MT5Tokenizer", "VideoPrismTokenizer", "SiglipTokenizer", "Siglip"
)  # fmt: skip
_FROM_LINES = ("", "BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer")
_FROM_MERGES = ("", "CLIPTokenizer", "RobertaTokenizer")
# Classes that transformers chooses by the model's type.
_OF_MODELS = {
    "siglip": "SiglipTokenizer", "t5": "T5Tokenizer", "mt5": "T5Tokenizer",
    "videoprism": "VideoPrismTokenizer",
}  # fmt: skip
_CLIP_ENDS = ("<|startoftext|>", "<|endoftext|>")


def slow_vocabulary(folder: epath.Path, kind: str, settings: Settings) -> tokenizers.Tokenizer:
    """Return the vocabulary of a folder without `tokenizer.json`, with its special tokens.

    `kind` is the class in its settings, without "Fast"; for `spiece.model`, `class_of_pieces`.

    Raises:
        CheckpointError: files of another class, or none, or files that do not fit.
    """
    if (pieces := folder / "spiece.model").exists():
        return _t5(pieces)
    if (pieces := folder / "sentencepiece.bpe.model").exists():
        _check(kind, _FROM_PIECES, pieces)
        return _xlm_roberta(pieces, settings)
    if (lines := folder / "vocab.txt").exists():
        _check(kind, _FROM_LINES, lines)
        return _bert_from_lines(lines, settings)
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        _check(kind, _FROM_MERGES, folder / "vocab.json")
        if kind == "RobertaTokenizer" or (not kind and "<s>" in read_json(folder / "vocab.json")):
            return _byte_level_from_merges(folder, settings)
        return _clip_from_merges(folder)
    raise CheckpointError(
        f"{folder} has no tokenizer.json: save or download the tokenizer beside the model"
    )


def class_of_pieces(folder: epath.Path, kind: str) -> str:
    """Return the class of a folder with `spiece.model`: `kind`, or that of its model's type.

    Raises:
        CheckpointError: another class, or none for this type of model.
    """
    file, about = folder / "spiece.model", folder / "config.json"
    if not kind:
        model = read_json(about).get("model_type") if about.exists() else None
        kind = _OF_MODELS.get(model, "") if isinstance(model, str) else ""
        if not kind:
            raise CheckpointError(
                f"{file} has no class: write tokenizer_class into "
                f"{folder / 'tokenizer_config.json'} ({', '.join(_FROM_SPIECE)})"
            )
    _check(kind, _FROM_SPIECE, file)
    return kind


def _t5(path: epath.Path) -> tokenizers.Tokenizer:
    """Return the vocabulary of T5Tokenizer, which pads with `<pad>`."""
    vocabulary = sentencepiece.read(path)
    if (pad := vocabulary.token_to_id("<pad>")) is not None:
        vocabulary.enable_padding(pad_id=pad, pad_token="<pad>")
    return vocabulary


def _check(kind: str, known: tuple[str, ...], file: epath.Path) -> None:
    if kind not in known:
        raise CheckpointError(
            f"{file} is of the class {brief(kind)}, which vlm reads from tokenizer.json alone: "
            "load it with transformers' AutoTokenizer, and save it into the folder"
        )


def _clip_from_merges(folder: epath.Path) -> tokenizers.Tokenizer:
    """Return the CLIPTokenizer of transformers for `vocab.json` and `merges.txt`."""
    vocab, merges = _vocab_and_merges(folder)
    bos, eos = (vocab.get(name) for name in _CLIP_ENDS)
    if bos is None or eos is None:
        raise CheckpointError(f"{folder / 'vocab.json'} has no {' or '.join(_CLIP_ENDS)}")
    ends = {"end_of_word_suffix": "</w>", "unk_token": _CLIP_ENDS[1]}
    vocabulary = tokenizers.Tokenizer(_bpe(folder, vocab, merges, **ends))
    vocabulary.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    vocabulary.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    vocabulary.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    vocabulary.post_processor = processors.RobertaProcessing(
        ("<|endoftext|>", eos), ("<|startoftext|>", bos), False, False
    )
    return vocabulary


def _byte_level_from_merges(folder: epath.Path, settings: Settings) -> tokenizers.Tokenizer:
    """Return the RobertaTokenizer of transformers for `vocab.json` and `merges.txt`."""
    vocab, merges = _vocab_and_merges(folder)
    names = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}
    names = {kind: settings.text(f"{kind}_token") or name for kind, name in names.items()}
    first, last = (
        settings.text("cls_token") or names["bos"],
        settings.text("sep_token") or names["eos"],
    )
    if missing := [name for name in (first, last, names["pad"]) if name not in vocab]:
        raise CheckpointError(f"{folder / 'vocab.json'} has no {missing[0]}, as RoBERTa's has")
    space = boolean(
        settings.values.get("add_prefix_space") or False, f"{settings.file}: add_prefix_space"
    )
    vocabulary = tokenizers.Tokenizer(_bpe(folder, vocab, merges))
    vocabulary.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    vocabulary.decoder = decoders.ByteLevel()
    _add_special(vocabulary, [name for name in names.values() if name in vocab])
    vocabulary.post_processor = processors.RobertaProcessing(
        (last, vocab[last]), (first, vocab[first]), True, space
    )
    vocabulary.enable_padding(pad_id=vocab[names["pad"]], pad_token=names["pad"])
    return vocabulary


def _xlm_roberta(path: epath.Path, settings: Settings) -> tokenizers.Tokenizer:
    """Return the XLMRobertaTokenizer of transformers for a SentencePiece file."""
    space = settings.values.get("add_prefix_space")
    if not boolean(True if space is None else space, f"{settings.file}: add_prefix_space"):
        raise CheckpointError(
            f"{settings.file}: add_prefix_space is false, and vlm supports only true for {path}: "
            "save the folder with a tokenizer.json"
        )
    for end, name in (("bos", "<s>"), ("eos", "</s>")):
        if (named := settings.text(f"{end}_token") or name) != name:
            raise CheckpointError(
                f"{settings.file}: {end}_token is {brief(named)}, and vlm supports only {name} for "
                f"{path}: save the folder with a tokenizer.json"
            )
    pieces, charsmap = sentencepiece.read_pieces(path)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    scored = [*((name, 0.0) for name in special), *pieces[3:], ("<mask>", 0.0)]
    try:
        vocabulary = tokenizers.Tokenizer(models.Unigram(scored, unk_id=3, byte_fallback=False))
        if charsmap:
            vocabulary.normalizer = normalizers.Precompiled(charsmap)
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} is not a SentencePiece model: {error}") from None
    vocabulary.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(sentencepiece.SPACE, "always")]
    )
    vocabulary.decoder = decoders.Metaspace(sentencepiece.SPACE, "always")
    _add_special(vocabulary, [*special, "<mask>"])
    vocabulary.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    vocabulary.enable_padding(pad_id=1, pad_token="<pad>")
    return vocabulary


def _add_special(vocabulary: tokenizers.Tokenizer, names: list[str]) -> None:
    vocabulary.add_special_tokens(
        [AddedToken(name, normalized=False, special=True) for name in names]
    )


def _vocab_and_merges(folder: epath.Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    vocab, file, merges = read_json(folder / "vocab.json"), folder / "merges.txt", []
    for number, line in enumerate(_lines(file), 1):
        if not line.strip() or (number == 1 and "#version" in line):
            continue
        pair = line.split()
        if len(pair) != 2:
            raise CheckpointError(
                f"{file}: line {number} is {brief(line)}, not a pair of symbols: download it again"
            )
        merges.append((pair[0], pair[1]))
    return vocab, merges


def _bpe(folder: epath.Path, vocab: dict[str, int], merges: Any, **options: Any) -> models.BPE:
    try:
        return models.BPE(vocab=vocab, merges=merges, **options)
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{folder}: vocab.json and merges.txt do not fit: {error}") from None


def _bert_from_lines(path: epath.Path, settings: Settings) -> tokenizers.Tokenizer:
    """Return the BertTokenizer of transformers for a `vocab.txt`."""
    vocab, special = wordpiece_lines(path), {}
    for kind in ("unk", "cls", "sep", "pad", "mask"):
        name = settings.text(f"{kind}_token") or f"[{kind.upper()}]"
        if kind != "mask" and name not in vocab:
            raise CheckpointError(f"{path} has no {name}: give the vocabulary of a BERT")
        special[kind] = name
    vocabulary = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=special["unk"]))
    vocabulary.normalizer = bert_normalizer(settings)
    vocabulary.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    vocabulary.decoder = decoders.WordPiece()
    vocabulary.add_special_tokens([name for name in special.values() if name in vocab])
    first, last = special["cls"], special["sep"]
    vocabulary.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        special_tokens=[(name, vocab[name]) for name in (first, last)],
    )
    vocabulary.enable_padding(pad_id=vocab[special["pad"]], pad_token=special["pad"])
    return vocabulary


def bert_normalizer(settings: Settings) -> normalizers.Normalizer:
    accents = settings.values.get("strip_accents")  # None: if lower-casing
    return normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.flag("tokenize_chinese_chars"),
        strip_accents=None if accents is None else settings.flag("strip_accents"),
        lowercase=settings.flag("do_lower_case"),
    )


def wordpiece_lines(path: epath.Path) -> dict[str, int]:
    """Return the tokens of a `vocab.txt` with their line numbers."""
    lines = _lines(path)
    lines = lines[:-1] if not lines[-1] else lines
    vocab = {line.rstrip("\r"): number for number, line in enumerate(lines)}
    if len(vocab) != len(lines):
        raise CheckpointError(f"{path} has a token twice: download it again")
    return vocab


def _lines(path: epath.Path) -> list[str]:
    try:
        return path.read_text().split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is no text ({error}): download it again") from None
