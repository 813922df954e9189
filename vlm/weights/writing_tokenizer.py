"""Export of a vlm tokenizer, with its rules, to a self-contained `tokenizer.json`.

Text cleaning becomes steps of its normaliser, including the repair of common mojibake and HTML
entities. Rare cases are not covered; `token_check` counts the texts that this affects.
"""

import json
import string
from typing import Any

import tokenizers
from etils import epath
from tokenizers import Regex, normalizers, processors

from vlm.errors import CheckpointError, brief
from vlm.inputs.cleaning import CLIP_SPECIALS
from vlm.inputs.tokenizer import Tokenizer
from vlm.weights.charsmap import charsmap
from vlm.weights.sentencepiece import SPACE

# Entities common in alt texts. HTML has 2,231; a Replace for each would take milliseconds a text.
_NAMES = (
    "lt gt quot apos nbsp copy reg trade deg hellip mdash ndash lsquo rsquo ldquo rdquo sbquo "
    "bdquo bull middot times euro pound cent yen sect para laquo raquo frac12 frac14 frac34 "
    "sup2 agrave aacute acirc atilde auml aring aelig ccedil egrave eacute ecirc euml igrave "
    "iacute icirc iuml ntilde ograve oacute ocirc otilde ouml oslash ugrave uacute ucirc uuml "
    "szlig Eacute Auml Ouml Uuml"
)
_ENTITIES = _NAMES.split()


def standalone(tokenizer: Tokenizer, *, cleaned: bool = False) -> tokenizers.Tokenizer:
    """Return the vocabulary with our rules: cleaning as normalisation, and the special tokens.

    With `cleaned`, its input texts are already cleaned.

    Raises:
        CheckpointError: the cleaning is BERT's, whose case folding no normaliser supports, or
            there is a default prompt.
    """
    rules, vocabulary = tokenizer.config, tokenizer.vocabulary
    if prompt := rules.prompt(None):
        raise CheckpointError(
            f"tokenizer.json has no place for the default prompt {brief(prompt)}: save the "
            "model as a vlm bundle, or without a prompt, as model.with_prompt(None)"
        )
    if rules.clean == "bert":
        raise CheckpointError(
            "tokenizer.json has no place for the cleaning 'bert' of the tokenizer: save the model "
            "as a vlm bundle instead"
        )
    steps = [] if cleaned else _cleaning(rules.clean)
    if rules.lowercase:
        steps += _LOWER
    plain = vocabulary.normalizer is None
    if steps:
        if vocabulary.normalizer is not None:
            steps.append(vocabulary.normalizer)
        vocabulary.normalizer = normalizers.Sequence(steps)
    pad_is_text = rules.pad_id in _ordinary(vocabulary)
    if _finds_special(tokenizer) and (pad_is_text or (steps and plain)):
        vocabulary = _with_found(
            vocabulary, special=not pad_is_text, normalized=bool(steps and plain)
        )
    names = {i: vocabulary.id_to_token(i) for i in (rules.bos_id, rules.eos_id) if i is not None}
    row = [names.get(i) if i is not None else None for i in (rules.bos_id, rules.eos_id)]
    row.insert(1, "$A")
    vocabulary.post_processor = processors.TemplateProcessing(
        single=" ".join(part for part in row if part),
        special_tokens=[(name, i) for i, name in names.items()],
    )
    return vocabulary


def tokenizer_files(
    folder: epath.Path, tokenizer: Tokenizer, *, cleaned: bool = False, **more: Any
) -> None:
    """Write a self-contained `tokenizer.json`, and `tokenizer_config.json` with the fields `more`.

    For `cleaned` see `standalone`.
    """
    rules = tokenizer.config
    vocabulary = standalone(tokenizer, cleaned=cleaned)
    (folder / "tokenizer.json").write_text(vocabulary.to_str(pretty=True))
    names = {"bos_token": rules.bos_id, "eos_token": rules.eos_id, "pad_token": rules.pad_id}
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": rules.context_length,
        "padding_side": rules.pad_side,
        "truncation_side": rules.truncation_side,
        **{name: vocabulary.id_to_token(i) for name, i in names.items() if i is not None},
        "clean_up_tokenization_spaces": False,
        # transformers makes its pad token special. If that is an ordinary token, such as CLIP's
        # "!", or if our rules do not parse special tokens, it must not look for them in texts.
        "split_special_tokens": not parses_special(tokenizer),
        "added_tokens_decoder": {},  # otherwise it changes the tokens of tokenizer.json
        **more,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")


def parses_special(tokenizer: Tokenizer) -> bool:
    """Return True if transformers finds the same special tokens in texts as vlm."""
    pad_is_text = tokenizer.config.pad_id in _ordinary(tokenizer.vocabulary)
    return _finds_special(tokenizer) and not pad_is_text


def _finds_special(tokenizer: Tokenizer) -> bool:
    """Return True if special tokens that are spelled out in a text are parsed."""
    rules = tokenizer.config  # two of the cleanings remove their brackets
    return rules.parse_special and rules.clean not in ("siglip", "clip_canonical")


def _ordinary(vocabulary: tokenizers.Tokenizer) -> set[int]:
    """Return the ids of tokens that ordinary text can have."""
    added = vocabulary.get_added_tokens_decoder()
    return set(vocabulary.get_vocab(with_added_tokens=False).values()) - set(added)


def _with_found(
    vocabulary: tokenizers.Tokenizer, *, special: bool, normalized: bool
) -> tokenizers.Tokenizer:
    """Return the vocabulary with added tokens that are found in texts even if not `special`.

    With `normalized`, they are looked for after cleaning, unless cleaning changes them.
    """
    contents = json.loads(vocabulary.to_str())
    for token in contents["added_tokens"]:
        token["special"] = token["special"] and special
        clean = vocabulary.normalizer
        if normalized and clean.normalize_str(token["content"]) == token["content"]:
            token["normalized"] = True
    return tokenizers.Tokenizer.from_str(json.dumps(contents))


# ------------------------------------------------------------- cleaning as normalisation

_SPACES = normalizers.Replace(Regex(r"[\s\x1c-\x1f\x85]+"), " ")
# Like Python's `str.lower`, where a Σ at the end of a word becomes ς.
_LOWER = [
    normalizers.Replace(Regex(r"(?<=\p{L})Σ(?![\p{M}\p{Cf}'’.:]*\p{L})"), "ς"),
    normalizers.Lowercase(),
]
_PUNCTUATION = "".join("\\" + mark for mark in string.punctuation)


def _cleaning(name: str) -> list[normalizers.Normalizer]:
    """Return the normaliser's steps for the cleaning of that name."""
    unmarked = normalizers.Replace(Regex(f"[{_PUNCTUATION}]"), "")
    if name == "none":
        return []
    if name == "siglip":  # adds a leading space before any vocabulary
        spaces = [_SPACES, normalizers.Strip(left=False, right=True), normalizers.Prepend(SPACE)]
        return [normalizers.Replace(SPACE, " "), *_LOWER, unmarked, *spaces]
    steps = _basic()
    if name == "clip_canonical":
        steps += [normalizers.Replace("_", " "), unmarked]
    steps += [_SPACES, normalizers.Strip()]
    if name == "clip_cased":
        return steps
    steps += _LOWER
    if name == "clip":
        names = "|".join(token.removeprefix("<") for token in CLIP_SPECIALS)
        swallowed = Regex(rf"(?<!_of_text>)(?<=[^\s\p{{L}}\p{{N}}])<(?={names})")
        steps += [normalizers.Replace(swallowed, "< "), normalizers.Replace("\u0345", " ")]
    return steps


def _basic() -> list[normalizers.Normalizer]:
    """Return the steps of `ftfy` that change single characters or entities, in its order."""
    from html.entities import html5

    import ftfy
    from ftfy import chardata, fixes

    steps: list[normalizers.Normalizer] = [
        normalizers.Replace(Regex("&(?:(?:amp|AMP);){1,2}(?=[#a-zA-Z])"), "&")
    ]
    for name in (*_ENTITIES, "amp"):
        char = html5[f"{name};"]
        names = {name} if char.isalpha() else {name, name.upper()}
        # Some names need no semicolon where a word ends.
        ended = [f"{n}(?:;|(?![A-Za-z0-9=;]))" if n in html5 else f"{n};" for n in sorted(names)]
        pattern = "|".join([*ended, f"#0*{ord(char)};", f"#[xX]0*(?i:{ord(char):x});"])
        steps.append(normalizers.Replace(Regex(f"&(?:{pattern})"), char))
    for name in _ENTITIES:
        char = html5[f"{name};"]
        broken = char.encode().decode("sloppy-windows-1252")
        if ftfy.fix_encoding(broken) == char:  # it does not repair all of them
            steps.append(normalizers.Replace(broken, char))
    for mark in (Regex(r"\x1b\[[\d;]*[a-zA-Z]"), "\0"):
        steps.append(normalizers.Replace(mark, ""))
    table: dict[str, str] = {}
    for code in range(0x80, 0xA0):
        table[chr(code)] = fixes.fix_c1_controls(chr(code))
    for group in (chardata.LIGATURES, chardata.WIDTH_MAP, chardata.CONTROL_CHARS):
        for code, target in group.items():
            table[chr(code)] = chr(target) if isinstance(target, int) else target or ""
    quotes = {"'": chardata.SINGLE_QUOTE_RE, '"': chardata.DOUBLE_QUOTE_RE}
    table = {chr(code): chr(code) for code in range(0x2B0, 0x2100)} | table
    for quote, form in quotes.items():  # also those in the letters of a ligature
        table = {char: form.sub(quote, target) for char, target in table.items()}
    table = {char: target for char, target in table.items() if char != target}
    steps += [normalizers.Precompiled(charsmap(table)), normalizers.NFC()]
    return steps
