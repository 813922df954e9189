"""Writes `golden/tokenizers/`: small folders of tokenizers, and the ids that transformers makes.

Run with transformers and sentencepiece installed: python tests/weights/make_tokenizers.py
A folder of the name `NAME_slow` has the files of the older classes alone.
"""

import json
import pathlib
import shutil
import sys
import tempfile

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, trainers
from transformers import AutoTokenizer

sys.path.append(str(pathlib.Path(__file__).parents[1] / "peers"))
from tokens import strings

FOLDER = pathlib.Path(__file__).parent / "golden" / "tokenizers"
LENGTH = 16
CORPUS = [text for text in strings(3000, seed=3) if text.isprintable() and 0 < len(text) < 200]
TEXTS = [*strings(200, seed=4), "a <new> token and <Other>cat", "<s> </s> <pad> <mask> [SEP] x"]


def settings(folder: pathlib.Path, **values: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(values | {"model_max_length": LENGTH}))


def byte_level(folder: pathlib.Path) -> None:
    """`vocab.json` and `merges.txt` of RoBERTa's kind."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet),
    )
    made.model.save(str(folder))


def word_pieces(folder: pathlib.Path) -> None:
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    corpus = [text.lower() for text in CORPUS]
    made.train_from_iterator(
        corpus,
        trainers.WordPieceTrainer(vocab_size=400, limit_alphabet=200, special_tokens=special),
    )
    made.model.save(str(folder))


def pieces(folder: pathlib.Path, name: str, **options: object) -> None:
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(text for text in CORPUS if max(map(ord, text)) < 0x180))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "made"), vocab_size=600, minloglevel=2,
        hard_vocab_limit=False, **options,
    )  # fmt: skip
    (folder / "made.model").rename(folder / name)
    (folder / "made.vocab").unlink()
    corpus.unlink()


def record(folder: pathlib.Path, name: str, model_type: str, *, slow: bool = False) -> None:
    """Write ids, and the folder: as it is if `slow`, else as transformers saves it."""
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = AutoTokenizer.from_pretrained(folder)
    out = FOLDER / name
    shutil.rmtree(out, ignore_errors=True)
    if slow:
        shutil.copytree(folder, out)
    else:
        theirs.save_pretrained(out)
    (out / "config.json").unlink(missing_ok=True)
    row = {"padding": "max_length", "truncation": True, "max_length": LENGTH}
    ids = theirs(TEXTS, **row, return_tensors="np")["input_ids"]
    np.savez_compressed(out / "ids.npz", ids=ids.astype(np.int32))
    print(name, type(theirs).__name__, len(theirs), ids[6][:12])


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "texts.json").write_text(json.dumps([text[:400] for text in TEXTS]))
    TEXTS[:] = [text[:400] for text in TEXTS]
    added = {"<new>": 0, "<Other>": 1}
    kinds = {
        "bert": (word_pieces, "bert", "BertTokenizer"),
        "roberta": (byte_level, "roberta", "RobertaTokenizer"),
        "xlmr": (
            lambda f: pieces(f, "sentencepiece.bpe.model"),
            "xlm-roberta",
            "XLMRobertaTokenizer",
        ),
    }
    for name, (write, model_type, kind) in kinds.items():
        for variant in ("slow", "fast", "added", "left", "cut_left"):
            with tempfile.TemporaryDirectory() as made:
                folder = pathlib.Path(made)
                write(folder)
                options: dict = {"tokenizer_class": kind}
                if variant == "left":
                    options["padding_side"] = "left"
                if variant == "cut_left":
                    options["truncation_side"] = "left"
                settings(folder, **options)
                if variant == "added":
                    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
                    size = len(AutoTokenizer.from_pretrained(folder))
                    numbers = {text: size + i for text, i in added.items()}
                    (folder / "added_tokens.json").write_text(json.dumps(numbers))
                    special = {"additional_special_tokens": ["<new>"]}
                    (folder / "special_tokens_map.json").write_text(json.dumps(special))
                record(folder, f"{name}_{variant}", model_type, slow=variant != "fast")


if __name__ == "__main__":
    main()
