"""What stands beside exported programs, so that others feed them rightly without vlm.

`export.json` says what goes in and comes out, `tokenizer.json` makes the tokens, and `README.md`
is a page with the code to call it.
"""

import ast
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from vlm._json import to_json
from vlm._version import __version__
from vlm.bundle import Bundle
from vlm.config import PreprocessConfig, to_dict
from vlm.errors import CheckpointError
from vlm.exporting.programs import Program
from vlm.heads.saved import Classifier
from vlm.heads.zero_shot import ZeroShotClassifier
from vlm.inputs import opening, resizing
from vlm.weights.sample_texts import sample_texts
from vlm.weights.token_check import compare_rows
from vlm.weights.writing_tokenizer import parses_special, standalone

ABOUT, TOKENIZER, PAGE = "export.json", "tokenizer.json", "README.md"
FORMAT = 1  # of export.json; raised when an older reader would misread it


def write(
    folder: epath.Path,
    bundle: Bundle,
    programs: list[Program],
    classifier: Classifier | None,
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
        if isinstance(classifier, ZeroShotClassifier) and classifier.groups:
            about["groups"] = classifier.groups  # levels of a hierarchy: labels under each node
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
        texts = sample_texts(1_000)
        rows = np.array([row.ids for row in vocabulary.encode_batch_fast(texts)])
        found = compare_rows("tokenizers", texts, bundle.tokenizer(texts), rows)
        if found.differ:
            notes.append(
                "Broken Unicode and HTML entities in texts were repaired by `ftfy`, of which "
                f"`tokenizer.json` has the common cases: {found}"
            )
    if not rules.keep_eos and rules.eos_id is not None:
        notes.append("A text too long for its row was cut without an end token after it.")
    if rules.zeroed_id is not None:
        notes.append(f"Set every token {rules.zeroed_id} of a row to 0.")
    (folder / TOKENIZER).write_text(vocabulary.to_str(pretty=True))
    return notes


def _about_pixels(config: PreprocessConfig) -> list[str]:
    notes = []
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
    "squash": "    image = resize(image, (SIZE, SIZE))\n",
    "squash and cut": f"""\
    image = resize(image, ({{short}}, {{short}}))
{_CENTRE}""",
    "crop": f"""\
    short = min(image.size)
    image = resize(image, tuple(int({{short}} * side / short) for side in image.size))
{_CENTRE}""",
    "pad": """\
    scale = SIZE / max(image.size)
    image = resize(image, tuple(max(1, round(side * scale)) for side in image.size))
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
        offset="round" if config.crop_rounding == "round" else "int",
        fill=config.pad_value,
    )
    plain = config.decode == "reference"
    opened = "Image.open(file)" if plain else "ImageOps.exif_transpose(Image.open(file))"
    if config.backend == "tensor":
        functions = resizing.resize_tensor, resizing.resize_matrix, *_PARTS_OF_TENSOR
        form = f"resize_tensor(np.asarray(image), size[1], size[0], {config.kernel!r}, "
        code = f"_SUPPORT = {resizing._SUPPORT}\n\n" + "\n\n".join(map(_plain, functions))
        resized = f"Image.fromarray({form}antialias={config.antialias}))"
    elif config.backend == "tensorflow":
        functions = resizing.resize_tensorflow, resizing._neighbours
        code = "\n\n".join(map(_plain, functions))
        resized = "Image.fromarray(resize_tensorflow(np.asarray(image), size[1], size[0]))"
    else:
        code = ""
        resized = f"image.resize(size, Image.Resampling.{config.kernel.upper()})"
    if config.decode == "reference":
        opened = 'image = Image.open(file).convert("RGB")'
    else:
        opened = f"image = _to_rgb(ImageOps.exif_transpose(Image.open(file)), {config.background})"
        code = "\n\n".join([_plain(opening._to_rgb), _plain(opening._eight_bits), code])
    return f"""\
from PIL import Image, ImageCms, ImageOps

SIZE = {config.image_size}

{code.strip()}

def resize(image, size):
    return {resized}

def pixels_of(file):
    {opened}
{resize}    return np.asarray(image)

pixels = np.stack([pixels_of(file) for file in ["photo.jpg"]])  # uint8, any number of them
"""


_PARTS_OF_TENSOR = resizing._fixed_point, resizing._shift, resizing._kernel


def _plain(function: Callable) -> str:
    """The source of a function of ours, without types and docstring, for a program without vlm."""
    tree = ast.parse(inspect.getsource(function))
    (made,) = tree.body
    assert isinstance(made, ast.FunctionDef)
    made.returns = None
    for argument in (*made.args.args, *made.args.kwonlyargs):
        argument.annotation = None
    if ast.get_docstring(made):
        made.body = made.body[1:]
    return ast.unparse(made) + "\n"


_TOKENS_CODE = """\
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.encode_special_tokens = {plain}
tokens = np.array([row.ids for row in tokenizer.encode_batch(["a cat", "a dog"])], np.int32)
"""


def _page(
    bundle: Bundle, programs: list[Program], facts: dict[str, Any], notes: list[str], use: str
) -> str:
    inputs = {program.input for program in programs}
    code = "import numpy as np\n"
    if "pixels" in inputs:
        code += _pixels_code(bundle.preprocess.config)
    if "tokens" in inputs:
        code += _TOKENS_CODE.format(plain=not parses_special(bundle.tokenizer))
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
