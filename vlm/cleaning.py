"""Text cleaning before the vocabulary, as each family's own code does it.

OpenAI's and open_clip's repair of mojibake is `ftfy`, which is why that library is a dependency.
"""

import html
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
    if any(token in text for token in _CLIP_SPECIALS):
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


_CLIP_SPECIALS = ("<start_of_text>", "<end_of_text>")


def _swallow(text: str) -> str:
    """Cut the special tokens whose "<" a run of punctuation before them has taken."""
    out, at = [], 0
    while at < len(text):
        special = next((t for t in _CLIP_SPECIALS if text.startswith(t, at)), None)
        end = at + (len(special) if special else 1)
        if special is None and _is_punctuation(text[at]):
            while end < len(text) and _is_punctuation(text[end]):
                end += 1
            out.append(text[at:end])
            if any(text.startswith(token, end - 1) for token in _CLIP_SPECIALS):
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
}
