"""Settings beside a vocabulary of transformers, each honoured, known to be harmless, or refused.

They are in `tokenizer_config.json`, and in old folders also in `special_tokens_map.json` and
`added_tokens.json`, which transformers reads where the first has no `added_tokens_decoder`.
"""

from typing import Any, Literal

import tokenizers
from etils import epath
from tokenizers import AddedToken

from vlm.errors import CheckpointError
from vlm.weights.fields import boolean, fields, read_json, show, string

# Tokens with a name. transformers makes special ones of all that it finds in these files.
NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# What changes ids and is read here or in `vocabularies`.
_ADD = ("add_bos_token", "add_eos_token")  # which are no tokens themselves
HONOURED = {
    *(f"{name}_token" for name in NAMED), "tokenizer_class", "padding_side", "truncation_side",
    "model_max_length", "do_lower_case", "strip_accents", "tokenize_chinese_chars",
    "split_special_tokens", "added_tokens_decoder", "additional_special_tokens",
    "extra_special_tokens", *_ADD,
}  # fmt: skip
# What changes no id of a text: where files came from, how ids become text, chats, and defaults of
# calls. `add_prefix_space` and `legacy` are in tokenizer.json already.
HARMLESS = {
    "name_or_path", "_name_or_path", "processor_class", "image_processor_type", "auto_map",
    "backend", "is_local", "local_files_only", "model_input_names", "tokenizer_file",
    "vocab_file", "merges_file", "special_tokens_map_file", "added_tokens_file", "init_inputs",
    "transformers_version", "_commit_hash", "chat_template", "errors",
    "clean_up_tokenization_spaces", "spaces_between_special_tokens", "use_default_system_prompt",
    "use_fast", "trust_remote_code", "max_length", "stride", "truncation_strategy",
    "pad_to_multiple_of", "pad_token_type_id", "padding", "truncation", "return_tensors",
    "return_token_type_ids", "return_attention_mask", "token_type_ids_pattern",
    "token_type_ids_include_special_tokens", "add_prefix_space", "legacy", "legacy_behaviour",
    "use_token_type_ids", "language", "src_lang", "tgt_lang", "lang_codes", "sp_model_file",
    "spm_file", "cls_token_id", "verbose", "device_map", "remove_space", "keep_accents",
    "fix_mistral_regex", "trim_offsets",
}  # fmt: skip
# What changes ids, and the one value that vlm has.
FIXED = {
    "do_basic_tokenize": True,
    "never_split": None,
    "sp_model_kwargs": {},
    "do_clean_text": True,
}


def read_settings(folder: epath.Path) -> dict[str, Any]:
    """The settings in a folder, those of its older files among them.

    Raises:
        CheckpointError: one that vlm does not know, or has no place for.
    """
    file = folder / "tokenizer_config.json"
    about = read_json(file) if file.exists() else {}
    sources = dict.fromkeys(about, file)
    if "added_tokens_decoder" not in about:
        if (older := folder / "special_tokens_map.json").exists():
            named = read_json(older)
            about, sources = about | named, sources | dict.fromkeys(named, older)
        if (older := folder / "added_tokens.json").exists():
            about["added_tokens_decoder"] = _decoder(read_json(older), about, older)
    for key, value in about.items():
        _check(key, value, sources.get(key, file))
    return about


# Empty values say nothing.
_NOTHING = (None, "", [], {})


def _check(key: str, value: Any, file: epath.Path) -> None:
    if key in FIXED:
        if value not in (None, FIXED[key]):
            raise CheckpointError(f"{file} has {key} {show(value)}: vlm knows {FIXED[key]!r} alone")
    elif key == "truncation_side":
        if value not in (None, "right"):
            raise CheckpointError(
                f"{file}: truncation_side is {show(value)}, and vlm cuts texts at their end: set "
                'it to "right"'
            )
    elif key not in HONOURED | HARMLESS and not key.endswith("_token") and value not in _NOTHING:
        raise CheckpointError(
            f"{file} has {key} {show(value)}, which vlm does not know: remove it if it changes no "
            "token ids"
        )


def _decoder(tokens: dict[str, Any], about: dict[str, Any], file: epath.Path) -> dict[str, Any]:
    """The tokens of an `added_tokens.json` as an `added_tokens_decoder`."""
    special = {text for text, _ in _special(about, file)}
    decoder = {}
    for text, token in tokens.items():
        if not isinstance(token, int):
            raise CheckpointError(f"{file}: {text} is {show(token)}, not the id of a token")
        decoder[str(token)] = {
            "content": text,
            "special": text in special,
            "normalized": text not in special,
        }
    return decoder


def add_tokens(vocabulary: tokenizers.Tokenizer, about: dict[str, Any], file: epath.Path) -> None:
    """Add to a vocabulary the tokens that its settings name, as transformers does.

    Raises:
        CheckpointError: a token whose id in the vocabulary is another.
    """
    decoder = fields(about.get("added_tokens_decoder"), f"{file}: added_tokens_decoder")
    there = {token.content for token in vocabulary.get_added_tokens_decoder().values()}
    try:
        numbered = sorted((int(number), value) for number, value in decoder.items())
    except (TypeError, ValueError):
        raise CheckpointError(f"{file}: added_tokens_decoder has an id that is no number") from None
    for number, value in numbered:
        text, token = _token(value, f"{file}: added_tokens_decoder[{number}]")
        if text and text not in there:
            (vocabulary.add_special_tokens if token.special else vocabulary.add_tokens)([token])
        if text and vocabulary.token_to_id(text) != number:
            raise CheckpointError(
                f"{file}: added_tokens_decoder says that {show(text)} is {number}, and in the "
                f"vocabulary it is {vocabulary.token_to_id(text)}: they are not of one tokenizer"
            )
        there.add(text)
    for text, token in _special(about, file):
        # One that the vocabulary lacks would be beyond the model's embeddings.
        if text and text not in there and vocabulary.token_to_id(text) is not None:
            vocabulary.add_special_tokens([token])
            there.add(text)


def _special(about: dict[str, Any], file: epath.Path) -> list[tuple[str, AddedToken]]:
    """The special tokens that settings name."""
    named = [(k, v) for k, v in about.items() if k.endswith("_token") and k not in _ADD]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = about.get(key) or []
        if not isinstance(more, dict | list):
            raise CheckpointError(f"{file}: {key} is {show(more)}, not a list of tokens")
        named += [(key, v) for v in (more.values() if isinstance(more, dict) else more)]
    return [_token(value, f"{file}: {key}") for key, value in named if value not in _NOTHING]


def _token(value: Any, where: str) -> tuple[str, AddedToken]:
    """A token, which is saved plain or as an object."""
    if isinstance(value, dict):
        text = string(value.get("content") or "", where)
        names = ("single_word", "lstrip", "rstrip", "normalized", "special")
        flags = {n: boolean(value[n], f"{where}: {n}") for n in names if value.get(n) is not None}
        return text, AddedToken(text, **({"special": True, "normalized": False} | flags))
    text = string(value, where)
    return text, AddedToken(text, special=True, normalized=False)


def padding_side(
    about: dict[str, Any], kind: str, vocabulary: tokenizers.Tokenizer, file: epath.Path
) -> Literal["left", "right"]:
    """The side of the padding: the setting's, or tokenizer.json's, or that of the class."""
    default = "left" if kind in ("GemmaTokenizer", "Siglip2Tokenizer") else "right"
    padding = vocabulary.padding or {}
    side = about.get("padding_side") or padding.get("direction") or default
    if side not in ("left", "right"):
        raise CheckpointError(f"{file}: padding_side is {show(side)}, not left or right")
    return side


def row_length(about: dict[str, Any], positions: int, file: epath.Path) -> int:
    """The length of a row: `model_max_length`, or fewer if the model has fewer positions."""
    most = about.get("model_max_length")
    if most is None:
        return positions
    if not isinstance(most, int | float) or isinstance(most, bool) or most < 1:
        raise CheckpointError(f"{file}: model_max_length is {show(most)}, not a number of tokens")
    return int(min(most, positions))


def check_ends(about: dict[str, Any], bos: int | None, eos: int | None, file: epath.Path) -> None:
    """Refuse `add_bos_token` and `add_eos_token` that contradict what tokenizer.json does."""
    for key, there in (("add_bos_token", bos is not None), ("add_eos_token", eos is not None)):
        asked = about.get(key)
        if asked is not None and boolean(asked, f"{file}: {key}") != there:
            raise CheckpointError(
                f"{file}: {key} is {asked}, and tokenizer.json "
                f"{'adds' if there else 'does not add'} that token: make the two agree"
            )
