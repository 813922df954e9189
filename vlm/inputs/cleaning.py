"""Text cleaning before the vocabulary, as each family's own code does it.

OpenAI's and open_clip's repair of mojibake is `ftfy`, which is why that library is a dependency.
"""

import html
import re
import string
import unicodedata
from collections.abc import Callable

_PUNCTUATION = str.maketrans("", "", string.punctuation)  # of ASCII


def basic(text: str) -> str:
    """Mojibake repaired, HTML entities resolved twice, as OpenAI's `basic_clean`."""
    import ftfy  # 0.1 s, and only some models want it

    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def clip(text: str) -> str:
    """OpenAI's: basic cleaning, single spaces, lower case.

    Two habits of its regular expression become spaces, which the vocabulary drops: a special token
    spelled out right after punctuation is no longer one, and U+0345, which is no letter but has one
    as its other case, belongs to no class of characters.
    """
    text = clip_cased(text).lower()
    if any(token in text for token in CLIP_SPECIALS):
        text = _swallow(text)
    return text.replace("\u0345", " ")


def clip_cased(text: str) -> str:
    """open_clip's "whitespace": basic cleaning and single spaces."""
    return " ".join(basic(text).split())


def clip_canonical(text: str) -> str:
    """open_clip's "canonicalize": basic cleaning, no punctuation, lower case, single spaces."""
    text = basic(text).replace("_", " ").translate(_PUNCTUATION)
    return " ".join(text.lower().split())


def siglip(text: str) -> str:
    """That of transformers' `SiglipTokenizer`: lower case, no punctuation, single spaces.

    It puts the piece "▁" in front first, so that a text that begins with a space begins with two.
    """
    text = "▁" + text.replace("▁", " ").lower().translate(_PUNCTUATION)
    return "" if (text := " ".join(text.split())) == "▁" else text


def bert(text: str) -> str:
    """The words of tensorflow_text's `BertTokenizer(lower_case=True)`, one space between them.

    In the order of its code: NFKC case folding, which also drops what is ignorable by default;
    NFD without nonspacing marks; control and format characters are spaces; a mark of punctuation
    and a Chinese character are words of their own. Unlike in transformers' tokenizer, full-width
    letters and ligatures are plain ones, "ß" is "ss", and a control character parts two words.
    A word of more than 100 bytes is unknown as a whole; one that no vocabulary has stands for it.
    """
    words = unicodedata.normalize("NFD", text.translate(_FOLDED)).translate(_PARTED).split(" ")
    return " ".join(
        word if len(word) <= 25 or len(word.encode("utf-8", "replace")) <= 100 else _TOO_LONG
        for word in words
        if word
    )


_TOO_LONG = "x" * 101  # WordPiece takes no word of more than 100 characters
# Characters that are ignorable by default (Unicode, DerivedCoreProperties.txt).
_IGNORABLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_CHINESE = re.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf"
    "\U0002f800-\U0002fa1f]"
)


class _Folded(dict[int, str]):
    """What `str.translate` makes of a character: its NFKC case folding (Unicode, NFKC_CF)."""

    def __missing__(self, code: int) -> str:
        char, before = chr(code), None
        while char != before:
            before = char
            folded = unicodedata.normalize("NFD", char).casefold()
            char = _IGNORABLE.sub("", unicodedata.normalize("NFKC", folded))
        return self.setdefault(code, char)


class _Parted(dict[int, str]):
    """What `str.translate` makes of a character of the folded text, so that spaces part words."""

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


_FOLDED, _PARTED = _Folded(), _Parted()

CLIP_SPECIALS = ("<start_of_text>", "<end_of_text>")


def _swallow(text: str) -> str:
    """Cut the special tokens whose "<" a run of punctuation before them has taken."""
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
