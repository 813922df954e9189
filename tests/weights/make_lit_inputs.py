"""Writes `golden/bert_tokens.npz` and `golden/tensorflow_pixels.npz`: big_vision's inputs.

What its `bert_tokenize` makes of awkward strings, by tensorflow_text's BertTokenizer with the
vocabulary of `make_lit.py`, and its `resize` of small images, by TensorFlow.
Run where tensorflow_text is installed, with no need of vlm:
python tests/weights/make_lit_inputs.py
"""

import pathlib
import random
import sys

import numpy as np
import tensorflow as tf
import tensorflow_text

sys.path.append(str(pathlib.Path(__file__).parents[1] / "peers"))
from tokens import strings

GOLDEN = pathlib.Path(__file__).parent / "golden"
VOCABULARY = GOLDEN / "bv_lit" / "model.txt"
LENGTH = 16
TEXTS = [
    "A photo of two DOGS, cat.", "[CLS] [SEP] [PAD] [UNK]", "Straße STRASSE straẞe", "ﬁne ﬁ of",
    "ｃａｔ １２", "Ⅷ ½ x²", "東京 한", "กา" * 17, "กา" * 16 + "a", "กา" * 17 + "a", "a" * 100,
    "a" * 101, "ca\u200dt do\u00adg", "ca\x00t do\x1bg", "cat\u0600dog", "cat\u2028dog\u1680of",
    "of\u00a0the\u3000cat\x0bdog", "é e\u0301 e\u0345 \u0391\u0345", "İI ıi", "cat\ufffd dog",
    "°C $5 #[a]",
]  # fmt: skip


def awkward(count: int) -> list[str]:
    """Runs of one script or block, marks in odd orders, words of about a hundred bytes."""
    rng, starts = random.Random(3), (0x300, 0x5B0, 0x600, 0x900, 0xE00, 0x1100, 0x1F00, 0x2000)
    starts += (0x4E00, 0xAC00, 0xFB00, 0xFF00, 0x1D400, 0x1F1E0)
    out = []
    for _ in range(count):
        text = ""
        for _ in range(rng.randint(1, 5)):
            start = rng.choice(starts)
            for _ in range(rng.randint(1, 30)):
                text += chr(start + rng.randrange(96)) if rng.random() < 0.6 else rng.choice("aB é")
        out.append(text)
    return out


texts = TEXTS + awkward(150) + strings(150, seed=2)
tokenizer = tensorflow_text.BertTokenizer(str(VOCABULARY), token_out_type=tf.int32, lower_case=True)
rows, _ = tensorflow_text.pad_model_inputs(tokenizer.tokenize(tf.constant(texts)), LENGTH - 1)
first = np.full((len(texts), 1), VOCABULARY.read_text().split("\n").index("[CLS]"))
np.savez_compressed(
    GOLDEN / "bert_tokens.npz",
    texts=np.array([text.encode() for text in texts], dtype=object).astype("S"),
    lengths=np.array([len(text.encode()) for text in texts]),  # numpy drops trailing zero bytes
    tokens=np.concatenate([first, rows.numpy()], axis=1).astype(np.int32),
)

pixels, rng = {}, np.random.default_rng(4)
for i, (height, width) in enumerate(((37, 53), (28, 28), (9, 5), (1, 1), (64, 23), (100, 28))):
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    image = image // 64 * 64 if i % 2 else image  # flat areas, where whole numbers stay so
    resized = tf.image.resize(image, (28, 28), method="bilinear", antialias=False)
    pixels[f"image/{i}"] = image
    pixels[f"resized/{i}"] = tf.cast(tf.clip_by_value(resized, 0, 255), tf.uint8).numpy()
np.savez_compressed(GOLDEN / "tensorflow_pixels.npz", **pixels)
