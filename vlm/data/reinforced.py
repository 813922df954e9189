"""Reinforced data: stored teacher embeddings of augmented examples, for distillation.

Every example is augmented `variants` times. The augmentation of variant v of example i follows from
the store's seed, so training reproduces it and reads the teacher's embeddings
(arXiv:2311.17049, section 3.1).

FOLDER/reinforced.json                the teacher and the data config
FOLDER/images.npy, FOLDER/texts.npy   (example, variant, width)
FOLDER/unfinished.json                instead of reinforced.json until complete, with the progress
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int

from vlm.config import DataConfig, from_dict, to_dict
from vlm.data.randomness import key, uniforms
from vlm.data.transform_example import ExampleTransform
from vlm.errors import ConfigError, DataError

FILE, UNFINISHED = "reinforced.json", "unfinished.json"
ARRAYS = ("images", "texts")
# Config fields that change the images or texts of an example.
MUST_MATCH = (
    "train_split", "image", "captions", "caption_weights", "label", "class_names", "templates",
    "filters", "augment",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Reinforced:
    """Store of teacher embeddings in `folder`; its arrays are memory-mapped."""

    folder: str
    seed: int
    variants: int
    examples: int
    width: int
    log_scale: float  # of the teacher's logits
    data: dict[str, Any]
    logit_bias: float | None = None  # older stores have none

    @classmethod
    def open(cls, folder: str) -> "Reinforced":
        """Open a store that `vlm data reinforce` wrote; DataError if it is incomplete."""
        path = Path(folder)
        try:
            about = json.loads((path / FILE).read_text())
            about.setdefault("logit_bias", None)
            found = cls(folder, **{f.name: about[f.name] for f in dataclasses.fields(cls)[1:]})
            shape = (found.examples, found.variants, found.width)
            if any(np.load(path / f"{name}.npy", mmap_mode="r").shape != shape for name in ARRAYS):
                raise ValueError("its arrays have another shape")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{folder} holds no embeddings of a teacher ({error}): make them with "
                "vlm data reinforce"
            ) from None
        return found

    def check(self, config: DataConfig, examples: int) -> None:
        """Raise a ConfigError unless the embeddings belong to the data of `config`."""
        ours = {name: to_dict(config)[name] for name in MUST_MATCH}
        stored = to_dict(from_dict(DataConfig, self.data))  # with fields by their present names
        theirs = {name: stored[name] for name in MUST_MATCH}
        for side in (ours, theirs):
            side["templates"] = side["templates"] or ["{}"]  # the default of `templates_of`
        differ = [f"data.{name}" for name in MUST_MATCH if ours[name] != theirs[name]]
        if differ:
            raise ConfigError(
                f"the embeddings in {self.folder} were made with different {', '.join(differ)}: "
                "make them agree, or run vlm data reinforce again"
            )
        if examples != self.examples:
            raise ConfigError(
                f"the embeddings in {self.folder} are for {self.examples:,} examples, and "
                f"{config.source} has {examples:,}: run vlm data reinforce again"
            )

    def choose(self, seed: int, positions: Int[np.ndarray, " b"]) -> Int[np.ndarray, " b"]:
        """Draw the variant at each position of a run with `seed`."""
        return (uniforms(key(seed, 7), positions, 1)[:, 0] * self.variants).astype(np.int64)

    def draws(
        self,
        transform: ExampleTransform,
        indices: Int[np.ndarray, " b"],
        variants: Int[np.ndarray, " b"],
    ) -> Float[np.ndarray, "b numbers"]:
        """Return the uniform numbers of these variants of these examples."""
        return variant_draws(transform, self.seed, self.variants, indices, variants)

    def embeddings(
        self, indices: Int[np.ndarray, " b"], variants: Int[np.ndarray, " b"]
    ) -> dict[str, Float32[np.ndarray, "b e"]]:
        """Look up the teacher embeddings of these variants, under their names in a batch."""
        names = zip(("teacher_image", "teacher_text"), ARRAYS, strict=True)
        return {ours: self._map(name)[indices, variants].astype(np.float32) for ours, name in names}

    def _map(self, name: str) -> np.ndarray:
        return np.load(Path(self.folder) / f"{name}.npy", mmap_mode="r")


def variant_draws(
    transform: ExampleTransform,
    seed: int,
    count: int,
    indices: Int[np.ndarray, " b"],
    variants: Int[np.ndarray, " b"],
) -> Float[np.ndarray, "b numbers"]:
    """Return the uniform numbers of variants of examples, with `count` variants each."""
    return transform.draws(key(seed, 8), indices * count + variants)
