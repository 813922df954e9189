"""Writes `golden/st_*`: small random text encoders as sentence-transformers saves them.

Run with sentence-transformers installed: python tests/weights/make_sentence_transformers.py
"""

import pathlib
import shutil
import tempfile

import numpy as np
import torch
from make_dual_encoders import text_of, vocabulary_of
from make_huggingface import TEXTS, randomise, tokenizer_files
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

GOLDEN = pathlib.Path(__file__).parent / "golden"


def record(name, encoder, made, seed, *more) -> None:
    vocabulary, _, pad, eos = made
    randomise(encoder, seed)
    with tempfile.TemporaryDirectory() as source:
        encoder.save_pretrained(source)
        tokenizer_files(pathlib.Path(source), vocabulary, "PreTrainedTokenizerFast", pad, eos)
        first = modules.Transformer(source, max_seq_length=13)
    for module in more:
        randomise(module, seed + 1)
    model = SentenceTransformer(modules=[first, *more])
    folder = GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save(str(folder))
    for extra in ("README.md", ".gitattributes"):
        (folder / extra).unlink(missing_ok=True)
    z = model.encode(TEXTS)
    np.savez_compressed(folder / "text.npz", texts=np.array(TEXTS), z_text=z)


if __name__ == "__main__":
    made = vocabulary_of("bert")
    text = text_of("bert", *made)
    dense = modules.Dense(24, 16, bias=False, activation_function=torch.nn.Identity())
    small = {"dim": 24, "hidden_dim": 37, "n_layers": 2, "n_heads": 3}
    distilled = DistilBertConfig(
        vocab_size=text["vocab_size"], max_position_embeddings=13, **small
    )  # as clip-ViT-B-32-multilingual-v1
    record("st_distilbert", DistilBertModel(distilled), made, 31, modules.Pooling(24), dense)
    pooling = modules.Pooling(24, "cls")
    bert = BertModel(BertConfig(**text))
    record("st_bert", bert, made, 33, pooling, modules.Normalize())
