"""Text cleaning before the vocabulary, as each family's own code does it.

OpenAI's and open_clip's repair of mojibake is `ftfy`, which is why that library is a dependency.
"""

import html
import string
from collections.abc import Callable

_PUNCTUATION = str.maketrans("", "", string.punctuation)  # of ASCII


def basic(text: str) -> str:
    """Mojibake repaired, HTML entities resolved twice, as OpenAI's `basic_clean`."""
    import ftfy  # 0.1 s, and only some models want it

    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def clip(text: str) -> str:
    """OpenAI's: basic cleaning, single spaces, lower case."""
    return clip_cased(text).lower()


def clip_cased(text: str) -> str:
    """open_clip's "whitespace": basic cleaning and single spaces."""
    return " ".join(basic(text).split())


def clip_canonical(text: str) -> str:
    """open_clip's "canonicalize": basic cleaning, no punctuation, lower case, single spaces."""
    text = basic(text).replace("_", " ").translate(_PUNCTUATION)
    return " ".join(text.lower().split())


def siglip(text: str) -> str:
    """That of transformers' `SiglipTokenizer`: lower case, no punctuation, single spaces."""
    return " ".join(text.lower().translate(_PUNCTUATION).split())


CLEANERS: dict[str, Callable[[str], str]] = {
    "none": lambda text: text,
    "clip": clip,
    "clip_cased": clip_cased,
    "clip_canonical": clip_canonical,
    "siglip": siglip,
}
