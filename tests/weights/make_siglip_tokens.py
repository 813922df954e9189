"""Writes `golden/spiece.model` and `golden/siglip_tokens.npz`: transformers' SiglipTokenizer.

Run with the extra `peers` installed: python tests/weights/make_siglip_tokens.py
"""

import pathlib
import tempfile

import numpy as np
import sentencepiece
from transformers import SiglipTokenizer

GOLDEN = pathlib.Path(__file__).parent / "golden"
CORPUS = """a photo of a cat
two dogs on the beach, running
the quick brown fox jumps over the lazy dog
a naïve café in the old town
a very long sentence about nothing at all but words and words
"""
TEXTS = ["a photo of a cat", "Two DOGS!", "", "  naïve\tcafé 🙂 ", "hello_world: 3.14",
         "words " * 40, "ﬁne ½ Ⅷ", "東京 ▁piece", "\x00\x1f control"]  # fmt: skip

with tempfile.TemporaryDirectory() as folder:
    corpus = pathlib.Path(folder) / "corpus.txt"
    corpus.write_text(CORPUS * 20)
    rules = pathlib.Path(folder) / "rules.tsv"
    rules.write_text("FB01\t66 69\nBD\t31 2044 32\n2167\t56 49 49 49\n9\t20\n1F\t\n")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=f"{folder}/spiece", vocab_size=120, pad_id=-1, bos_id=-1,
        eos_id=1, unk_id=2, control_symbols="<pad>", hard_vocab_limit=False, minloglevel=2,
        normalization_rule_tsv=str(rules),  # a few of NFKC's: all of them take 240 kB
    )  # fmt: skip
    (GOLDEN / "spiece.model").write_bytes(pathlib.Path(f"{folder}/spiece.model").read_bytes())
tokenizer = SiglipTokenizer(str(GOLDEN / "spiece.model"))
rows = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=16, return_tensors="np")
np.savez_compressed(
    GOLDEN / "siglip_tokens.npz", texts=np.array(TEXTS), tokens=rows["input_ids"].astype(np.int32)
)
