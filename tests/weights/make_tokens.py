"""Writes `golden/clip_tokens.npz`: what open_clip's tokenizer makes of 300 awkward strings.

Run with the extra `peers` installed: python tests/weights/make_tokens.py
"""

import pathlib
import sys

import numpy as np
import open_clip

sys.path.append(str(pathlib.Path(__file__).parents[1] / "peers"))
from tokens import strings

texts = strings(300, seed=1)
np.savez_compressed(
    pathlib.Path(__file__).parent / "golden" / "clip_tokens.npz",
    texts=np.array([text.encode() for text in texts], dtype=object).astype("S"),
    lengths=np.array([len(text.encode()) for text in texts]),  # numpy drops trailing zero bytes
    tokens=open_clip.SimpleTokenizer()(texts).numpy().astype(np.int32),
)
