"""Text cleaning before tokenization, equal to the reference code of each model family.

OpenAI and open_clip repair mojibake with `ftfy`, which is why it is a dependency.
"""

import html
import re
import string
import unicodedata
from collections.abc import Callable

_PUNCTUATION = str.maketrans("", "", string.punctuation)  # of ASCII


def basic(text: str) -> str:
    """Repair mojibake and unescape HTML twice, as OpenAI's `basic_clean`."""
    import ftfy  # takes 0.1 s, and only some models need it

    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def clip(text: str) -> str:
    """Clean as OpenAI's CLIP: basic cleaning, single spaces, lower case.

    Two effects of its regular expression are reproduced with spaces, which the vocabulary drops. A
    special token written right after punctuation is split. U+0345, which is not a letter but has a
    letter as its other case, matches no character class.
    """
    text = clip_cased(text).lower()
    if any(token in text for token in CLIP_SPECIALS):
        text = _break_specials(text)
    return text.replace("\u0345", " ")


def clip_cased(text: str) -> str:
    """Clean as open_clip's "whitespace": basic cleaning and single spaces."""
    return " ".join(basic(text).split())


def clip_canonical(text: str) -> str:
    """Clean as open_clip's "canonicalize": no punctuation, lower case, single spaces."""
    text = basic(text).replace("_", " ").translate(_PUNCTUATION)
    return " ".join(text.lower().split())


def siglip(text: str) -> str:
    """Clean as transformers' `SiglipTokenizer`: lower case, no punctuation, single spaces.

    It first prepends "▁", so a text that begins with a space gets two.
    """
    text = "▁" + text.replace("▁", " ").lower().translate(_PUNCTUATION)
    return "" if (text := " ".join(text.split())) == "▁" else text


def bert(text: str) -> str:
    """Split into words as tensorflow_text's `BertTokenizer(lower_case=True)`, joined by spaces.

    In the order of its code: NFKC case folding, which also drops default-ignorable characters; NFD
    without nonspacing marks; control and format characters become spaces; each punctuation mark and
    Chinese character is a word. Unlike in transformers' tokenizer, full-width letters and ligatures
    become plain ones, "ß" becomes "ss", and control characters separate words. A word of more than
    100 bytes is replaced by one that no vocabulary contains, so that it becomes unknown.
    """
    words = unicodedata.normalize("NFD", text.translate(_CASE_FOLD)).translate(_SPLIT).split(" ")
    return " ".join(
        word if len(word) <= 25 or len(word.encode("utf-8", "replace")) <= 100 else _TOO_LONG
        for word in words
        if word
    )


_TOO_LONG = "x" * 101  # WordPiece maps words over 100 characters to unknown
# Default-ignorable characters (Unicode, DerivedCoreProperties.txt).
_IGNORABLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_CHINESE = re.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf"
    "\U0002f800-\U0002fa1f]"
)


class _CaseFold(dict[int, str]):
    """Table for `str.translate`: NFKC case folding of each character (Unicode, NFKC_CF)."""

    def __missing__(self, code: int) -> str:
        char, before = chr(code), None
        while char != before:
            before = char
            folded = unicodedata.normalize("NFD", char).casefold()
            char = _IGNORABLE.sub("", unicodedata.normalize("NFKC", folded))
        return self.setdefault(code, char)


class _Split(dict[int, str]):
    """Table for `str.translate` of folded text: puts spaces between words."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        kind = unicodedata.category(char)
        if kind == "Mn":
            part = ""
        elif kind in ("Cc", "Cf"):
            part = " "
        elif kind[0] == "P" or char in string.punctuation or _CHINESE.match(char):
            part = f" {char} "
        else:
            part = char
        return self.setdefault(code, part)


_CASE_FOLD, _SPLIT = _CaseFold(), _Split()

CLIP_SPECIALS = ("<start_of_text>", "<end_of_text>")


def _break_specials(text: str) -> str:
    """Break special tokens whose "<" is part of the punctuation before them."""
    out, at = [], 0
    while at < len(text):
        special = next((t for t in CLIP_SPECIALS if text.startswith(t, at)), None)
        end = at + (len(special) if special else 1)
        if special is None and _is_punctuation(text[at]):
            while end < len(text) and _is_punctuation(text[end]):
                end += 1
            out.append(text[at:end])
            if any(text.startswith(token, end - 1) for token in CLIP_SPECIALS):
                out.append(" ")
        else:
            out.append(text[at:end])
        at = end
    return "".join(out)


def _is_punctuation(char: str) -> bool:
    return not char.isspace() and unicodedata.category(char)[0] not in "LN"


CLEANERS: dict[str, Callable[[str], str]] = {
    "none": lambda text: text,
    "clip": clip,
    "clip_cased": clip_cased,
    "clip_canonical": clip_canonical,
    "siglip": siglip,
    "bert": bert,
}
