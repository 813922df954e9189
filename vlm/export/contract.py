"""What stands beside exported programs, so that others feed them rightly without vlm.

`export.json` says what goes in and comes out, `tokenizer.json` makes the tokens, and `README.md`
is a page with the code to call it.
"""

from typing import Any

from etils import epath

from vlm._json import to_json
from vlm._version import __version__
from vlm.bundle import Bundle
from vlm.config import PreprocessConfig, to_dict
from vlm.errors import CheckpointError
from vlm.export.programs import Program
from vlm.heads.zero_shot import ZeroShotClassifier
from vlm.weights.writing_tokenizer import standalone

ABOUT, TOKENIZER, PAGE = "export.json", "tokenizer.json", "README.md"
FORMAT = 1  # of export.json; raised when an older reader would misread it


def write(
    folder: epath.Path,
    bundle: Bundle,
    programs: list[Program],
    classifier: ZeroShotClassifier | None,
    facts: dict[str, Any],
    use: str,
) -> None:
    """The files beside the programs; `facts` are of this export, `use` is its format's code."""
    names = [program.name for program in programs]
    about: dict[str, Any] = {
        "format": FORMAT,
        "made_by": f"vlm {__version__}",
        "model": bundle.name,
        "fingerprint": bundle.fingerprint,
        **facts,
        "programs": {
            program.name: {
                "input": {
                    "name": program.input,
                    "shape": ["batch", *program.row],
                    "dtype": program.dtype.__name__,
                },
                "output": {
                    "name": program.output,
                    "shape": ["batch", program.expected.shape[1]],
                    "dtype": "float32",
                },
            }
            for program in programs
        },
        "logits": {
            "scale": bundle.logit_scale,
            "bias": bundle.logit_bias,
            "scores": bundle.loss,
        },
    }
    notes = []
    if {"image", "classifier"} & set(names):
        about["preprocess"] = to_dict(bundle.preprocess.config)
        notes += _about_pixels(bundle.preprocess.config)
    if "text" in names:
        about["tokenizer"] = to_dict(bundle.tokenizer.config)
        notes += _write_tokenizer(folder, bundle)
    if classifier is not None:
        about["labels"], about["rule"] = list(classifier.labels), classifier.rule
    (folder / ABOUT).write_text(to_json(about, indent=2, ensure_ascii=False) + "\n")
    (folder / PAGE).write_text(_page(bundle, programs, facts, notes, use))


def _write_tokenizer(folder: epath.Path, bundle: Bundle) -> list[str]:
    """`tokenizer.json` that makes whole rows by itself; returns what it cannot do."""
    rules, notes = bundle.tokenizer.config, []
    try:
        vocabulary = standalone(bundle.tokenizer)
    except CheckpointError:
        vocabulary = bundle.tokenizer.vocabulary
        notes.append(
            "`tokenizer.json` holds the vocabulary alone: clean and lower-case texts as BERT does, "
            "and add the special tokens that `export.json` names."
        )
    vocabulary.enable_truncation(rules.context_length)
    vocabulary.enable_padding(
        length=rules.context_length,
        pad_id=rules.pad_id,
        pad_token=vocabulary.id_to_token(rules.pad_id),
        direction=rules.pad_side,
    )
    if rules.clean.startswith("clip"):
        notes.append("Broken Unicode and HTML entities in texts were mended before (`ftfy`).")
    if not rules.keep_eos and rules.eos_id is not None:
        notes.append("A text too long for its row was cut without an end token after it.")
    if rules.zeroed_id is not None:
        notes.append(f"Set every token {rules.zeroed_id} of a row to 0.")
    (folder / TOKENIZER).write_text(vocabulary.to_str(pretty=True))
    return notes


def _about_pixels(config: PreprocessConfig) -> list[str]:
    notes = []
    if config.backend != "pillow":
        whose = "PyTorch's `interpolate` of uint8" if config.backend == "tensor" else "TensorFlow's"
        notes.append(f"The model's own pixels come from {whose}; Pillow's differ a little.")
    if config.decode == "reference":
        notes.append('Image files are decoded by Pillow\'s `Image.open(file).convert("RGB")`.')
    elif config.background is not None:
        notes.append(f"Transparent pixels lie on the colour {config.background}.")
    return notes


# ---------------------------------------------------------------------------------- page

_CENTRE = """\
    left, top = ({offset}((side - SIZE) / 2) for side in image.size)
    image = image.crop((left, top, left + SIZE, top + SIZE))
"""
_RESIZE = {
    "squash": "    image = image.resize((SIZE, SIZE), KERNEL)\n",
    "squash and cut": f"""\
    image = image.resize(({{short}}, {{short}}), KERNEL)
{_CENTRE}""",
    "crop": f"""\
    short = min(image.size)
    image = image.resize(tuple(int({{short}} * side / short) for side in image.size), KERNEL)
{_CENTRE}""",
    "pad": """\
    scale = SIZE / max(image.size)
    image = image.resize(tuple(max(1, round(side * scale)) for side in image.size), KERNEL)
    canvas = Image.new("RGB", (SIZE, SIZE), {fill})
    canvas.paste(image, tuple((SIZE - side) // 2 for side in image.size))
    image = canvas
""",
}


def _pixels_code(config: PreprocessConfig) -> str:
    form = config.resize
    if form == "squash" and config.short_side not in (None, config.image_size):
        form = "squash and cut"
    resize = _RESIZE[form].format(
        short=config.short_side or config.image_size,
        offset="round" if config.crop_offset == "round" else "int",
        fill=config.fill,
    )
    plain = config.decode == "reference"
    opened = "Image.open(file)" if plain else "ImageOps.exif_transpose(Image.open(file))"
    return f"""\
from PIL import Image, ImageOps

SIZE, KERNEL = {config.image_size}, Image.Resampling.{config.kernel.upper()}

def pixels_of(file):
    image = {opened}.convert("RGB")
{resize}    return np.asarray(image)

pixels = np.stack([pixels_of(file) for file in ["photo.jpg"]])  # uint8, any number of them
"""


_TOKENS_CODE = """\
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
tokens = np.array([row.ids for row in tokenizer.encode_batch(["a cat", "a dog"])], np.int32)
"""

_LAST = {
    "embeddings": "# {output}: float32 rows of unit norm; their products are cosines",
    "scores": "# scores: float32, a column for each of the labels in export.json",
}


def _page(
    bundle: Bundle, programs: list[Program], facts: dict[str, Any], notes: list[str], use: str
) -> str:
    inputs = {program.input for program in programs}
    code = "import numpy as np\n"
    if "pixels" in inputs:
        code += _pixels_code(bundle.preprocess.config)
    if "tokens" in inputs:
        code += _TOKENS_CODE
    for program in programs:
        called = f"z_{program.name}" if program.output == "embeddings" else "scores"
        lines = use.format(program=program.name, input=program.input, output=program.output)
        code += f"\n{lines}\n"
        code += f"{called} = {program.output}\n" if called != program.output else ""
    if {"image", "text"} <= {program.name for program in programs}:
        scale, bias = bundle.logit_scale, bundle.logit_bias
        code += f"\nlogits = {scale!r} * z_image @ z_text.T + {bias!r}\n"
    sizes = facts["batches"]
    row = list(range(sizes[0], sizes[-1] + 1))
    tried = f"{row[0]} to {row[-1]}" if sizes == row else ", ".join(map(str, sizes))
    differences = ", ".join(f"{name} {value:.1e}" for name, value in facts["difference"].items())
    said = "".join(f"\n{note}" for note in notes)
    return f"""\
# {bundle.name}

As {facts["kind"]}, parameters in {facts["dtype"]}, by vlm {__version__}. Programs take batches of
any size: pixels as they come out of the resize (uint8, 0 to 255, normalised inside), tokens as
int32. Embeddings have unit norm.

Largest difference from the original, batches of {tried} rows: {differences}.
{said}

```python
{code}```
"""
