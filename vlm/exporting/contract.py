"""Files beside exported programs, so that they can be used without vlm.

`export.json` describes inputs and outputs, `tokenizer.json` makes the tokens, and `README.md` has
the code to run the programs.
"""

import ast
import dataclasses
import inspect
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from vlm._html import render
from vlm._json import to_json
from vlm._version import __version__
from vlm.bundle import Bundle
from vlm.config import PreprocessConfig, to_dict
from vlm.errors import CheckpointError
from vlm.exporting.programs import ExportProgram
from vlm.heads.saved import Classifier
from vlm.heads.zero_shot import ZeroShotClassifier
from vlm.inputs import opening, resizing
from vlm.weights.sample_texts import sample_texts
from vlm.weights.token_check import compare_rows
from vlm.weights.writing_tokenizer import parses_special, standalone

FORMAT = 1  # of export.json; raised when an older reader would misread it


def write(
    folder: epath.Path,
    bundle: Bundle,
    programs: list[ExportProgram],
    classifier: Classifier | None,
    facts: dict[str, Any],
    use: str,
) -> None:
    """Write the files; `facts` are of this export, `use` is the code of its format."""
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
        if bundle.preprocess.config.decode == "reference":
            notes.append('Image files are decoded by Pillow\'s `Image.open(file).convert("RGB")`.')
        elif (colour := bundle.preprocess.config.background) is not None:
            notes.append(f"Transparent pixels are placed on the colour {colour}.")
    if "text" in names:
        about["tokenizer"] = to_dict(bundle.tokenizer.config)
        notes += _write_tokenizer(folder, bundle)
    if classifier is not None:
        about["labels"], about["rule"] = list(classifier.labels), classifier.rule
        if isinstance(classifier, ZeroShotClassifier) and classifier.groups:
            about["groups"] = classifier.groups  # of a hierarchy: labels under each node
    (folder / "export.json").write_text(to_json(about, indent=2, ensure_ascii=False) + "\n")
    (folder / "README.md").write_text(_page(bundle, programs, facts, notes, use))


def _write_tokenizer(folder: epath.Path, bundle: Bundle) -> list[str]:
    """Write a `tokenizer.json` that makes complete rows; return notes on what it cannot do."""
    rules, notes, tokenizer = bundle.tokenizer.config, [], bundle.tokenizer
    if prompt := rules.prompt(None):
        notes.append(f"Put {json.dumps(prompt)} before every text: it is the model's prompt.")
        unprompted = dataclasses.replace(rules, default_prompt=None)
        tokenizer = tokenizer.with_rules(unprompted)
    try:
        vocabulary = standalone(tokenizer)
    except CheckpointError:
        vocabulary = bundle.tokenizer.vocabulary
        notes.append(
            "`tokenizer.json` holds the vocabulary alone: clean and lower-case texts as BERT does, "
            "and add the special tokens that `export.json` names."
        )
    vocabulary.enable_truncation(rules.context_length, direction=rules.truncation_side)
    vocabulary.enable_padding(
        length=rules.context_length,
        pad_id=rules.pad_id,
        pad_token=vocabulary.id_to_token(rules.pad_id),
        direction=rules.pad_side,
    )
    if rules.clean.startswith("clip"):
        texts = sample_texts(1_000)
        rows = np.array([row.ids for row in vocabulary.encode_batch_fast(texts)])
        check = compare_rows("tokenizers", texts, tokenizer(texts), rows)
        if check.differ:
            notes.append(
                "In training, `ftfy` repaired broken Unicode and HTML entities; `tokenizer.json` "
                f"covers the common cases: {check}"
            )
    if not rules.keep_eos and rules.eos_id is not None:
        notes.append("Texts that are too long are truncated without an end token.")
    if rules.zeroed_id is not None:
        notes.append(f"Set every token {rules.zeroed_id} of a row to 0.")
    (folder / "tokenizer.json").write_text(vocabulary.to_str(pretty=True))
    return notes


def pixels_code(config: PreprocessConfig) -> str:
    """Write the program that makes pixels from image files as the model does."""
    functions: list[Callable] = []
    if config.decode != "reference":
        functions += [opening._to_rgb, opening._strips, opening._in_strips, opening._composite]
        functions += [opening._values, opening._range, opening._eight_bits]
    if config.backend == "tensor":
        functions += [resizing.resize_tensor, resizing.resize_matrix]
        functions += [resizing._fixed_point, resizing._shift, resizing._kernel]
    elif config.backend == "tensorflow":
        functions += [resizing.resize_tensorflow, resizing._neighbours]
    elif config.backend == "scipy":
        functions += [resizing.resize_scipy]
    code = "\n\n".join(map(_plain, functions))
    if config.decode != "reference":
        code = f"_STRIP_PIXELS = {opening._STRIP_PIXELS}\n\n{code}"
    if config.backend == "tensor":
        code = f"_SUPPORT = {resizing._SUPPORT}\n\n{code}"
    return render("exporting/pixels.py.jinja", config=config, functions=code.strip())


def _plain(function: Callable) -> str:
    """Return the source of a function of vlm, without types and docstring."""
    tree = ast.parse(inspect.getsource(function))
    (definition,) = tree.body
    assert isinstance(definition, ast.FunctionDef)
    definition.returns = None
    for argument in (*definition.args.args, *definition.args.kwonlyargs):
        argument.annotation = None
    if ast.get_docstring(definition):
        definition.body = definition.body[1:]
    return ast.unparse(definition) + "\n"


def _page(
    bundle: Bundle,
    programs: list[ExportProgram],
    facts: dict[str, Any],
    notes: list[str],
    use: str,
) -> str:
    names = {program.name for program in programs}
    sizes = facts["batches"]
    consecutive = sizes == list(range(sizes[0], sizes[-1] + 1))
    differences = (f"{name} {value:.1e}" for name, value in facts["difference"].items())
    return render(
        "exporting/README.md.jinja",
        bundle=bundle,
        version=__version__,
        facts=facts,
        batches=f"{sizes[0]} to {sizes[-1]}" if consecutive else ", ".join(map(str, sizes)),
        differences=", ".join(differences),
        notes=notes,
        pixels=pixels_code(bundle.preprocess.config) if names - {"text"} else "",
        has_text="text" in names,
        special_as_text="text" in names and not parses_special(bundle.tokenizer),
        programs=programs,
        uses=[use.format(program=p.name, input=p.input, output=p.output) for p in programs],
        has_logits=names >= {"image", "text"},
    )
