"""Tokenizer settings of transformers: each is read, known to be irrelevant, or an error.

They are in `tokenizer_config.json`. If that has no `added_tokens_decoder`, transformers reads the
older files `special_tokens_map.json` and `added_tokens.json` too.
"""

from dataclasses import dataclass
from typing import Any, Literal

import tokenizers
from etils import epath
from tokenizers import AddedToken

from vlm.errors import CheckpointError, brief
from vlm.weights.fields import boolean, choice, fields, read_json, string

# Named tokens. transformers makes all of them special.
NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_ADD = ("add_bos_token", "add_eos_token")  # flags, not tokens
# Settings that change ids, and are read here or in `vocabularies`.
HONOURED = {
    *(f"{name}_token" for name in NAMED), "tokenizer_class", "padding_side", "truncation_side",
    "model_max_length", "do_lower_case", "strip_accents", "tokenize_chinese_chars",
    "split_special_tokens", "added_tokens_decoder", "additional_special_tokens",
    "extra_special_tokens", *_ADD,
}  # fmt: skip
# Settings that change no id of a text: sources of files, decoding, chats, and defaults of calls.
# tokenizer.json already has `add_prefix_space` and `legacy`; without it, `slow_vocabularies` reads
# `add_prefix_space`.
HARMLESS = {
    "name_or_path", "_name_or_path", "processor_class", "image_processor_type", "auto_map",
    "backend", "is_local", "local_files_only", "model_input_names", "tokenizer_file",
    "vocab_file", "merges_file", "special_tokens_map_file", "added_tokens_file", "init_inputs",
    "transformers_version", "_commit_hash", "chat_template", "errors",
    "clean_up_tokenization_spaces", "spaces_between_special_tokens", "use_default_system_prompt",
    "use_fast", "trust_remote_code", "max_length", "stride", "truncation_strategy",
    "pad_to_multiple_of", "pad_token_type_id", "padding", "truncation", "return_tensors",
    "return_token_type_ids", "return_attention_mask", "token_type_ids_pattern", "extra_ids",
    "token_type_ids_include_special_tokens", "add_prefix_space", "legacy", "legacy_behaviour",
    "use_token_type_ids", "language", "src_lang", "tgt_lang", "lang_codes", "sp_model_file",
    "spm_file", "cls_token_id", "verbose", "device_map", "remove_space", "keep_accents",
    "fix_mistral_regex", "trim_offsets", "unk_id",
}  # fmt: skip
# Settings that change ids, and the only value that vlm supports.
FIXED = {
    "do_basic_tokenize": True,
    "never_split": None,
    "sp_model_kwargs": {},
    "do_clean_text": True,
}


_NOTHING = (None, "", [], {})  # values that mean no setting


@dataclass(frozen=True)
class Settings:
    """Settings of a tokenizer, and the file that has them, for messages."""

    values: dict[str, Any]
    file: epath.Path

    @classmethod
    def read(cls, folder: epath.Path) -> "Settings":
        """Read the settings in a folder, including those of its older files.

        Raises:
            CheckpointError: a setting that vlm does not support.
        """
        file = folder / "tokenizer_config.json"
        values = read_json(file) if file.exists() else {}
        sources = dict.fromkeys(values, file)
        if "added_tokens_decoder" not in values:
            if (older := folder / "special_tokens_map.json").exists():
                named = read_json(older)
                values, sources = values | named, sources | dict.fromkeys(named, older)
            if (older := folder / "added_tokens.json").exists():
                special = {text for text, _ in cls(values, older).special_tokens()}
                values["added_tokens_decoder"] = _decoder(read_json(older), special, older)
        for key, value in values.items():
            _check(key, value, sources.get(key, file))
        return cls(values, file)

    def flag(self, name: str) -> bool:
        """Return an option that is on by default."""
        return boolean(self.values.get(name, True), f"{self.file}: {name}")

    def text(self, name: str) -> str:
        """Return a string, or the text of a token, which may be an object; empty if not set."""
        value = self.values.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        return string(value or "", f"{self.file}: {name}")

    def token_id(self, name: str, vocabulary: tokenizers.Tokenizer) -> int | None:
        """Return the id of a named token, or None if the settings have none.

        Raises:
            CheckpointError: the vocabulary does not have the token.
        """
        text = self.text(name)
        token = vocabulary.token_to_id(text)
        if text and token is None:
            raise CheckpointError(
                f"{self.file}: {name} {brief(text)} is not in its vocabulary: name a token that is"
            )
        return token

    def add_tokens(self, vocabulary: tokenizers.Tokenizer) -> None:
        """Add the tokens of the settings to a vocabulary, like transformers.

        Raises:
            CheckpointError: the vocabulary has another id for a token.
        """
        where = f"{self.file}: added_tokens_decoder"
        decoder = fields(self.values.get("added_tokens_decoder"), where)
        there = {token.content for token in vocabulary.get_added_tokens_decoder().values()}
        try:
            numbered = sorted((int(number), value) for number, value in decoder.items())
        except (TypeError, ValueError):
            raise CheckpointError(f"{where} has an id that is no number") from None
        for number, value in numbered:
            text, token = _token(value, f"{where}[{number}]")
            if text and text not in there:
                (vocabulary.add_special_tokens if token.special else vocabulary.add_tokens)([token])
            if text and vocabulary.token_to_id(text) != number:
                raise CheckpointError(
                    f"{where} gives {brief(text)} the id {number}, and the vocabulary "
                    f"{vocabulary.token_to_id(text)}: they are not of one tokenizer"
                )
            there.add(text)
        for text, token in self.special_tokens():
            # A token that the vocabulary lacks would have no embedding.
            if text and text not in there and vocabulary.token_to_id(text) is not None:
                vocabulary.add_special_tokens([token])
                there.add(text)

    def special_tokens(self) -> list[tuple[str, AddedToken]]:
        """Return the special tokens that are named."""
        named = [(k, v) for k, v in self.values.items() if k.endswith("_token") and k not in _ADD]
        for key in ("additional_special_tokens", "extra_special_tokens"):
            more = self.values.get(key) or []
            if not isinstance(more, dict | list):
                raise CheckpointError(f"{self.file}: {key} is {brief(more)}, not a list of tokens")
            named += [(key, v) for v in (more.values() if isinstance(more, dict) else more)]
        return [_token(v, f"{self.file}: {key}") for key, v in named if v not in _NOTHING]

    def padding_side(self, kind: str, vocabulary: tokenizers.Tokenizer) -> Literal["left", "right"]:
        """Return the padding side: of the settings, else of tokenizer.json, else of the class."""
        default = "left" if kind in ("GemmaTokenizer", "Siglip2Tokenizer") else "right"
        padding = vocabulary.padding or {}
        side = self.values.get("padding_side") or padding.get("direction") or default
        return choice(side, ("left", "right"), f"{self.file}: padding_side")

    def truncation_side(self, vocabulary: tokenizers.Tokenizer) -> Literal["left", "right"]:
        """Return the side that long texts lose: of the settings, else of tokenizer.json."""
        saved = (vocabulary.truncation or {}).get("direction", "right")
        side = self.values.get("truncation_side") or saved
        return choice(side, ("left", "right"), f"{self.file}: truncation_side")

    def context_length(self, positions: int) -> int:
        """Return `model_max_length`, or the number of positions of the model if it is less."""
        most = self.values.get("model_max_length")
        if most is None:
            return positions
        if not isinstance(most, int | float) or isinstance(most, bool) or most < 1:
            raise CheckpointError(
                f"{self.file}: model_max_length is {brief(most)}, not a number of tokens"
            )
        return int(min(most, positions))

    def check_ends(self, **added: bool) -> None:
        """Raise an error if `add_bos_token` or `add_eos_token` contradicts tokenizer.json."""
        for key, there in added.items():
            if self.values.get(key) is not None and self.flag(key) != there:
                raise CheckpointError(
                    f"{self.file}: {key} is {self.values[key]}, and tokenizer.json "
                    f"{'adds' if there else 'does not add'} that token: make the two agree"
                )


def _check(key: str, value: Any, file: epath.Path) -> None:
    """Raise an error for a setting that vlm does not support."""
    if key in FIXED:
        if value not in (None, FIXED[key]):
            raise CheckpointError(
                f"{file} has {key} {brief(value)}: vlm supports only {FIXED[key]!r}"
            )
    elif key not in HONOURED | HARMLESS and not key.endswith("_token") and value not in _NOTHING:
        raise CheckpointError(
            f"{file} has {key} {brief(value)}, which vlm does not support: remove it if it changes "
            "no token ids"
        )


def _decoder(tokens: dict[str, Any], special: set[str], file: epath.Path) -> dict[str, Any]:
    """Return the tokens of an `added_tokens.json` as an `added_tokens_decoder`."""
    decoder = {}
    for text, token in tokens.items():
        if not isinstance(token, int):
            raise CheckpointError(f"{file}: {text} is {brief(token)}, not the id of a token")
        flags = {"special": text in special, "normalized": text not in special}
        decoder[str(token)] = {"content": text, **flags}
    return decoder


def _token(value: Any, where: str) -> tuple[str, AddedToken]:
    """Return a token, saved as a string or as an object."""
    if isinstance(value, dict):
        text = string(value.get("content") or "", where)
        names = ("single_word", "lstrip", "rstrip", "normalized", "special")
        flags = {n: boolean(value[n], f"{where}: {n}") for n in names if value.get(n) is not None}
        return text, AddedToken(text, **({"special": True, "normalized": False} | flags))
    text = string(value, where)
    return text, AddedToken(text, special=True, normalized=False)
