"""Tokenizers of public checkpoints, from the files beside them."""

import dataclasses
import pathlib
from typing import Any

import tokenizers
from etils import epath

from vlm.config import Clean, ModelConfig, TokenizerConfig
from vlm.errors import CheckpointError, DataError
from vlm.inputs.tokenizer import Tokenizer, read_vocabulary
from vlm.weights import sentencepiece, tokenizer_settings
from vlm.weights.fields import boolean, fields, read_json, show, string

CLIP_VOCABULARY = pathlib.Path(__file__).parent / "clip" / "tokenizer.json"
CLIP_BOS, CLIP_EOS, CLIP_SIZE = 49406, 49407, 49408


def clip_tokenizer(
    context_length: int, *, clean: Clean = "clip", keep_eos: bool = True
) -> Tokenizer:
    """OpenAI's vocabulary, cleaning and padding, which open_clip's `SimpleTokenizer` shares."""
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


def huggingface_tokenizer(
    folder: epath.Path, config: ModelConfig, *, clean: Clean = "none"
) -> Tokenizer:
    """The tokenizer that transformers saved in `folder`, with the rules of its class.

    Raises:
        CheckpointError: its files are missing or corrupt, or they have a setting that vlm does not
            know or has no place for.
    """
    file = folder / "tokenizer_config.json"
    about = tokenizer_settings.read_settings(folder)
    kind = string(about.get("tokenizer_class") or "", f"{file}: tokenizer_class")
    kind = kind.removesuffix("Fast")
    length = config.text.context_length
    if clean == "none":  # else open_clip's text_cfg has the length
        length = tokenizer_settings.row_length(about, length, file)
    pieces = folder / "spiece.model"
    if kind in ("Siglip", "SiglipTokenizer") and pieces.exists():
        if not _flag(about, "do_lower_case", file):
            raise CheckpointError(f"{file}: do_lower_case is false, and vlm knows true for SigLIP")
        own = siglip_tokenizer(pieces, length, clean=clean if clean != "none" else "siglip")
        return _with_named(own, about, file)
    path = folder / "tokenizer.json"
    if path.exists():
        vocabulary = _vocabulary(path)
        if kind == "BertTokenizer":  # its settings come before the normaliser in the file
            vocabulary.normalizer = _bert_normalizer(about, file)
    elif pieces.exists():
        vocabulary = sentencepiece.read(pieces)
    elif (folder / "vocab.txt").exists():
        vocabulary = _bert_from_lines(folder / "vocab.txt", about, file)
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        vocabulary = _clip_from_merges(folder)
    else:
        raise CheckpointError(
            f"{folder} has no tokenizer.json: save or download the tokenizer beside the model"
        )
    if "Gemma" in kind or "Siglip2" in kind:
        _lowercase(vocabulary)  # as SigLIP 2 was trained
    tokenizer_settings.add_tokens(vocabulary, about, file)
    padding, truncation = vocabulary.padding, vocabulary.truncation
    if truncation and truncation["direction"] != "right" and not about.get("truncation_side"):
        raise CheckpointError(f"{path} cuts texts at their beginning: vlm cuts them at their end")
    side = tokenizer_settings.padding_side(about, kind, vocabulary, file)
    vocabulary.no_padding()  # a tokenizer that was in use is saved with the length of its rows
    vocabulary.no_truncation()
    eos_token = _content(about, "eos_token", file)
    eos = vocabulary.token_to_id(eos_token)
    if vocabulary.post_processor is None and kind in ("GemmaTokenizer", "Siglip2Tokenizer"):
        name = eos_token or "<eos>"
        token = vocabulary.token_to_id(name)
        if token is None:
            raise CheckpointError(f"{file}: eos_token {show(name)} is not in its vocabulary")
        specials = [token]
    else:
        specials = vocabulary.encode("", add_special_tokens=True).ids
    bos_id, eos_id = _ends(specials, eos, folder)
    tokenizer_settings.check_ends(about, bos_id, eos_id, file)
    pad = _id_of(vocabulary, about, "pad_token", file)
    if pad is None:
        pad = padding["pad_id"] if padding else eos_id
    rules = TokenizerConfig(
        context_length=length,
        pad_id=0 if pad is None else pad,
        bos_id=bos_id,
        eos_id=eos_id,
        clean=clean,
        pad_side=side,
        parse_special=not boolean(
            about.get("split_special_tokens") or False, f"{file}: split_special_tokens"
        ),
    )
    return Tokenizer(vocabulary, rules)


def _with_named(tokenizer: Tokenizer, about: dict[str, Any], file: epath.Path) -> Tokenizer:
    """SigLIP's tokenizer with the tokens and the side of padding that its settings name."""
    vocabulary, rules = tokenizer.vocabulary, tokenizer.config
    pad, eos = (_id_of(vocabulary, about, f"{name}_token", file) for name in ("pad", "eos"))
    rules = dataclasses.replace(
        rules,
        pad_id=rules.pad_id if pad is None else pad,
        eos_id=rules.eos_id if eos is None else eos,
        pad_side=tokenizer_settings.padding_side(about, "SiglipTokenizer", vocabulary, file),
    )
    tokenizer_settings.check_ends({**about, "add_bos_token": None}, None, rules.eos_id, file)
    return tokenizer.with_rules(rules)


def _id_of(
    vocabulary: tokenizers.Tokenizer, about: dict[str, Any], name: str, file: epath.Path
) -> int | None:
    """The id of a named token; None if there is none.

    Raises:
        CheckpointError: the vocabulary does not have it.
    """
    text = _content(about, name, file)
    found = vocabulary.token_to_id(text)
    if text and found is None:
        raise CheckpointError(
            f"{file}: {name} {show(text)} is not in its vocabulary: name a token that is"
        )
    return found


# The cleaning of open_clip's tokenizers by the name in `tokenizer_kwargs`.
OPEN_CLIP_CLEAN: dict[str, Clean] = {
    "lower": "clip",
    "whitespace": "clip_cased",
    "canonicalize": "clip_canonical",
}


def open_clip_tokenizer(
    folder: epath.Path, values: dict[str, Any], config: ModelConfig
) -> Tokenizer:
    """The tokenizer that open_clip's `get_tokenizer` makes for a `text_cfg`.

    Raises:
        CheckpointError: its files are missing, or it has an option that vlm does not know.
    """
    where = f"{folder}: text_cfg"
    options = dict(fields(values.get("tokenizer_kwargs"), f"{where}.tokenizer_kwargs"))
    name = string(values.get("hf_tokenizer_name") or "", f"{where}.hf_tokenizer_name")
    clean = options.pop("clean", "whitespace" if name else "lower")
    strip = options.pop("strip_sep_token", False)
    options.pop("trust_remote_code", None)
    if options or not isinstance(clean, str) or clean not in OPEN_CLIP_CLEAN:
        raise CheckpointError(
            f"{where}.tokenizer_kwargs is {show(values['tokenizer_kwargs'])}, and vlm knows "
            f"strip_sep_token, and clean of {', '.join(OPEN_CLIP_CLEAN)}"
        )
    cleaning = OPEN_CLIP_CLEAN[clean]
    if not name:
        return clip_tokenizer(config.text.context_length, clean=cleaning)
    tokenizer = huggingface_tokenizer(folder, config, clean=cleaning)
    if strip:  # the separator, which ends a text and may be spelled out inside it
        rules = dataclasses.replace(tokenizer.config, zeroed_id=tokenizer.config.eos_id)
        tokenizer = tokenizer.with_rules(rules)
    return tokenizer


def siglip_tokenizer(
    path: epath.PathLike, context_length: int, *, clean: Clean = "siglip"
) -> Tokenizer:
    """A SentencePiece vocabulary with the rules of SigLIP's first version: pad and end are "</s>".

    Raises:
        CheckpointError: the file is missing or is not a SentencePiece model.
    """
    # The cleaning of that name puts a space in front itself.
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


# big_vision's vocabularies by their size, and the model files they are.
BIG_VISION = {
    32_000: "gs://t5-data/vocabs/cc_en.32000/sentencepiece.model",
    250_000: "gs://t5-data/vocabs/mc4.250000.100extra/sentencepiece.model",
    256_000: "gs://big_vision/gemma_tokenizer.model",
}
_BESIDE = ("sentencepiece.model", "spiece.model", "tokenizer.model", "gemma_tokenizer.model")


def big_vision_tokenizer(folder: epath.Path, config: ModelConfig) -> Tokenizer:
    """The SentencePiece file beside an `.npz`, with the rules of SigLIP 1 or of SigLIP 2 (Gemma's).

    Raises:
        CheckpointError: there is none, which the message says where to get.
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


# Every published LiT model has texts of 16 tokens, though a BERT has positions for 512.
_BERT_LENGTH = 16
_BERT = "uncased_L-12_H-768_A-12 (github.com/google-research/bert)"


def bert_tokenizer(path: epath.Path, config: ModelConfig) -> Tokenizer:
    """The WordPiece vocabulary beside an `.npz` with a BERT, by the rules of `bert_tokenize`.

    [CLS], the text, padding of zeros; no [SEP]. (big_vision/pp/proj/flaxformer/bert_ops.py, over
    tensorflow_text's BertTokenizer: see `vlm.inputs.cleaning.bert`.)

    Raises:
        CheckpointError: there is none, or it is not that of the model.
    """
    # As in the bucket that the models come from: LiT-B16B.npz and LiT-B16B.txt.
    names = (f"{path.stem}.txt", "vocab.txt", "tokenizer.json")
    file = next((path.parent / name for name in names if (path.parent / name).exists()), None)
    if file is None:
        raise CheckpointError(
            f"{path.parent} has no vocabulary, which big_vision keeps apart: put the vocab.txt of "
            f"{_BERT} beside the .npz"
        )
    vocab = _wordpiece_json(file) if file.suffix == ".json" else _wordpiece_lines(file)
    if missing := [token for token in ("[CLS]", "[UNK]") if token not in vocab]:
        raise CheckpointError(f"{file} has no {missing[0]}: give the vocabulary of a BERT")
    if len(vocab) != config.text.vocab_size:
        raise CheckpointError(
            f"{file} has {len(vocab):,} tokens and the embedding table of {path} "
            f"{config.text.vocab_size:,} rows: they are not of one model"
        )
    model = tokenizers.models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100)
    vocabulary = tokenizers.Tokenizer(model)
    vocabulary.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", behavior="removed")
    vocabulary.decoder = tokenizers.decoders.WordPiece()
    rules = TokenizerConfig(
        context_length=min(_BERT_LENGTH, config.text.context_length),
        pad_id=0,
        bos_id=vocab["[CLS]"],
        eos_id=None,
        clean="bert",
    )
    return Tokenizer(vocabulary, rules)


def _wordpiece_lines(path: epath.Path) -> dict[str, int]:
    """The tokens of a `vocab.txt`, each by the number of its line."""
    try:
        lines = path.read_text().split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is no vocab.txt ({error}): download it again") from None
    lines = lines[:-1] if not lines[-1] else lines
    vocab = {line.rstrip("\r"): number for number, line in enumerate(lines)}
    if len(vocab) != len(lines):
        raise CheckpointError(f"{path} has a token twice: download it again")
    return vocab


def _wordpiece_json(path: epath.Path) -> dict[str, int]:
    """The tokens of a `tokenizer.json`; the rules in it are transformers', not big_vision's."""
    vocabulary = _vocabulary(path)
    if not isinstance(vocabulary.model, tokenizers.models.WordPiece):
        raise CheckpointError(f"{path} holds no WordPiece, which is what a BERT has")
    return vocabulary.get_vocab(with_added_tokens=False)


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig, where: Any) -> None:
    """Refuse a tokenizer that makes ids the model has no embedding for."""
    if tokenizer.vocab_size > config.text.vocab_size:
        raise CheckpointError(
            f"{where}: its tokenizer has {tokenizer.vocab_size:,} tokens and its embedding table "
            f"{config.text.vocab_size:,} rows: they are not of one model"
        )


def _clip_from_merges(folder: epath.Path) -> tokenizers.Tokenizer:
    """`vocab.json` and `merges.txt`, as transformers' CLIPTokenizer puts them together."""
    from tokenizers import Regex, models, normalizers, pre_tokenizers, processors

    vocab = read_json(folder / "vocab.json")
    try:
        lines = (folder / "merges.txt").read_text().split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{folder}/merges.txt is no text ({error}): get it again") from None
    pairs = (line.split() for line in lines if line[:1] != "#")
    merges = [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]
    try:
        bos, eos = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
        model = models.BPE(
            vocab=vocab, merges=merges, end_of_word_suffix="</w>", unk_token="<|endoftext|>"
        )
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{folder}: vocab.json and merges.txt do not fit: {error}") from None
    vocabulary = tokenizers.Tokenizer(model)
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


def _bert_from_lines(
    path: epath.Path, about: dict[str, Any], file: epath.Path
) -> tokenizers.Tokenizer:
    """`vocab.txt`, as transformers' BertTokenizer makes a tokenizer of it."""
    from tokenizers import decoders, models, pre_tokenizers, processors

    vocab, special = _wordpiece_lines(path), {}
    for kind in ("unk", "cls", "sep", "pad", "mask"):
        name = _content(about, f"{kind}_token", file) or f"[{kind.upper()}]"
        if kind != "mask" and name not in vocab:
            raise CheckpointError(f"{path} has no {name}: give the vocabulary of a BERT")
        special[kind] = name
    vocabulary = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=special["unk"]))
    vocabulary.normalizer = _bert_normalizer(about, file)
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


def _bert_normalizer(about: dict[str, Any], file: epath.Path) -> tokenizers.normalizers.Normalizer:
    accents = about.get("strip_accents")  # null: where letters are made small
    return tokenizers.normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=_flag(about, "tokenize_chinese_chars", file),
        strip_accents=None if accents is None else boolean(accents, f"{file}: strip_accents"),
        lowercase=_flag(about, "do_lower_case", file),
    )


def _flag(about: dict[str, Any], name: str, file: epath.Path) -> bool:
    """An option that is on unless the file turns it off."""
    return boolean(about.get(name, True), f"{file}: {name}")


def _lowercase(vocabulary: tokenizers.Tokenizer) -> None:
    from tokenizers import normalizers

    if "Lowercase" in repr(vocabulary.normalizer):
        return
    first = [] if vocabulary.normalizer is None else [vocabulary.normalizer]
    vocabulary.normalizer = normalizers.Sequence([normalizers.Lowercase(), *first])


def _ends(specials: list[int], eos: int | None, where: Any) -> tuple[int | None, int | None]:
    """The begin and end tokens among those that an empty text is given."""
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


def _content(about: dict[str, Any], name: str, file: epath.Path) -> str:
    """A token's text, which is saved plain or as an object; empty where there is none."""
    token = about.get(name)
    if isinstance(token, dict):
        token = token.get("content")
    return string(token or "", f"{file}: {name}")
