"""Reader of SentencePiece `.model` files as `tokenizers` vocabularies.

It does not need the library sentencepiece. The file is one protocol buffer:
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

import contextlib
import struct
from collections.abc import Iterator
from typing import Any

import tokenizers
from etils import epath
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from vlm.errors import CheckpointError
from vlm.inputs.vocabulary_check import check_vocabulary, library_errors

SPACE = "▁"  # the symbol of a space
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)  # kinds of pieces
_UNIGRAM, _BPE = 1, 2  # kinds of models
_MAX_FILE, _MAX_PIECE = 64 << 20, 1024  # bytes


def read(path: epath.PathLike, *, prefix: bool = True) -> tokenizers.Tokenizer:
    """Return the vocabulary of a `.model` file with its normalisation, without special tokens.

    Without `prefix`, no space is put before a text, even if the file asks for one.

    Raises:
        CheckpointError: missing, corrupt, or a kind of model other than unigram and BPE.
    """
    with _reading(path) as data:
        vocabulary = _build(data, prefix)
        check_vocabulary(vocabulary)
        return vocabulary


def read_pieces(path: epath.PathLike) -> tuple[list[tuple[str, float]], bytes]:
    """Return the pieces of a unigram `.model` with their scores, and its normalisation table.

    Raises:
        CheckpointError: missing, corrupt, or of another kind.
    """
    with _reading(path) as data:
        pieces, trainer, normalizer = _parts(data)
        if (kind := trainer.get(3, _UNIGRAM)) != _UNIGRAM:
            raise ValueError(f"it is of kind {kind}, and only unigram (1) is read")
        return [(text, score) for text, score, _ in pieces], normalizer.get(2, b"")


@contextlib.contextmanager
def _reading(path: epath.PathLike) -> Iterator[bytes]:
    """Yield the contents of a file; errors of its parser become a CheckpointError."""
    path = epath.Path(path)
    try:
        if (length := path.stat().length) > _MAX_FILE:
            raise CheckpointError(f"{path} has {length:,} bytes, which no vocabulary has")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        with library_errors():
            yield data
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{path} is not a SentencePiece model: {error}") from None


def _parts(data: bytes) -> tuple[list[tuple[str, float, int]], dict[int, Any], dict[int, Any]]:
    """Return pieces with score and kind, and the fields of trainer and normaliser."""
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(data):
        if number in (1, 2, 3) and not isinstance(value, bytes):
            raise ValueError(f"its field {number} is a number")
        if number == 1:
            piece = dict(_fields(value))
            if len(piece[1]) > _MAX_PIECE:
                raise ValueError(f"it has a piece of {len(piece[1]):,} bytes")
            score = struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0]
            pieces.append((piece[1].decode(), score, piece.get(3, _NORMAL)))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    if not pieces:
        raise ValueError("it has no pieces")
    return pieces, trainer, normalizer


def _build(data: bytes, prefix: bool) -> tokenizers.Tokenizer:
    pieces, trainer, normalizer = _parts(data)
    kind = trainer.get(3, _UNIGRAM)
    unknown = next((i for i, p in enumerate(pieces) if p[2] == _UNKNOWN), None)
    byte_fallback = bool(trainer.get(35, 0))
    if kind == _UNIGRAM:
        scored = [(text, score) for text, score, _ in pieces]
        model = models.Unigram(scored, unk_id=unknown, byte_fallback=byte_fallback)
    elif kind == _BPE:
        model = _bpe(pieces, unknown, byte_fallback)
    else:
        raise ValueError(f"it is of kind {kind}, and only unigram (1) and BPE (2) are read")
    vocabulary = tokenizers.Tokenizer(model)
    vocabulary.add_special_tokens(
        [AddedToken(p[0], normalized=False, special=True) for p in pieces if p[2] == _CONTROL]
    )
    vocabulary.add_tokens(
        [AddedToken(p[0], normalized=False, special=False) for p in pieces if p[2] == _USER]
    )
    steps = []
    if charsmap := normalizer.get(2, b""):
        steps.append(normalizers.Precompiled(charsmap))
    if normalizer.get(4, 1):  # remove_extra_whitespaces
        # Spelled-out symbols at the end are also removed: SentencePiece takes them for spaces.
        cuts = {r"\A +": "", rf"[ {SPACE}]+\z": "", " {2,}": " "}
        steps += [normalizers.Replace(Regex(cut), rest) for cut, rest in cuts.items()]
    scheme = "never"
    if prefix and normalizer.get(3, 1):  # add_dummy_prefix
        # Metaspace would not add one before a spelled-out symbol.
        steps.append(normalizers.Prepend(" "))
        scheme = "always"
    if steps:
        vocabulary.normalizer = normalizers.Sequence(steps)
    vocabulary.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "never", split=kind == _UNIGRAM)
    vocabulary.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(SPACE, scheme)]
    )
    return vocabulary


def _bpe(pieces, unknown: int | None, byte_fallback: bool) -> models.BPE:
    """Return a BPE whose merges are ordered by the score of the merged piece."""
    vocab = {text: i for i, (text, _, _) in enumerate(pieces)}
    merges = []
    for text, i in vocab.items():
        if pieces[i][2] not in (_NORMAL, _USER):
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in vocab and right in vocab:
                merges.append((-pieces[i][1], vocab[left], vocab[right], left, right))
    merges.sort()
    return models.BPE(
        vocab=vocab,
        merges=[(left, right) for *_, left, right in merges],
        unk_token=None if unknown is None else pieces[unknown][0],
        fuse_unk=True,
        byte_fallback=byte_fallback,
    )


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the fields of one message: integers as int, everything else as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
        elif wire in (1, 2, 5):
            if wire == 2:
                size, at = _varint(data, at)
            else:
                size = 8 if wire == 1 else 4
            value, at = data[at : at + size], at + size
            if at > len(data):
                raise ValueError("it ends too early")
        else:
            raise ValueError(f"it has wire type {wire}")
        yield number, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("it has a number of more than 64 bits")
