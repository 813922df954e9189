"""Token ids of 10,000 strings beside the reference tokenizers, for each family.

Run with the extra `peers` installed beside vlm: python tests/peers/tokens.py
It prints, for each tokenizer, how many strings differ, and the first few that do.
"""

import pathlib
import random
import sys
import tempfile
import unicodedata

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "weights")]


def strings(count: int, seed: int = 0) -> list[str]:
    """Words, Unicode, emoji, entities, mojibake, control characters; empty and very long."""
    rng = random.Random(seed)
    words = (  # noqa: SIM905
        "a photo of the cat dog's they're I'll naïve café Straße ΣΊΣΥΦΟΣ İstanbul 東京 한국어 "
        "العربية हिन्दी ไทย 123 4.5 1e9 &amp; &lt;b&gt; &#39;x&#39; don't DON'T 'S ﬁne ½ Ⅷ "
        "<start_of_text> <|endoftext|> </s> <eos> _under_score_ hello... !!! @user #tag "
        "https://example.com/?a=b&c=d schÃ¶n â€œquotedâ€\x9d ▁piece ſ 'ſ K"
    ).split(" ")
    emoji = ["🙂", "👩‍👩‍👧", "🇫🇷", "👍🏽", "❤️", "🏴󠁧󠁢󠁥󠁮󠁧󠁿"]
    spaces = [" ", "  ", "\t", "\n", "\u00a0", "\u3000", "\u200b", "\x00", "\x1c", "\x85", "\u2028"]
    assigned = [
        chr(c) for c in range(0x20, 0x30000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")
    ]
    out = ["", " ", "\n\n", "a" * 5000, "long text " * 300, "🙂" * 200]
    while len(out) < count:
        parts = [" "] if rng.random() < 0.1 else []
        for _ in range(rng.randint(1, 12)):
            kind = rng.random()
            if kind < 0.6:
                parts.append(rng.choice(words))
            elif kind < 0.75:
                parts.append("".join(rng.choices(assigned, k=rng.randint(1, 6))))
            elif kind < 0.85:
                parts.append(rng.choice(emoji))
            else:
                parts.append("".join(chr(rng.randint(1, 0x2FF)) for _ in range(rng.randint(1, 8))))
            parts.append(rng.choice(spaces) if rng.random() < 0.3 else " ")
        out.append("".join(parts))
    return out


def report(name: str, ours: np.ndarray, theirs: np.ndarray, texts: list[str]) -> None:
    differ = np.flatnonzero((ours != theirs).any(1))
    print(f"{name:40} {len(differ):5} of {len(texts):,} differ")
    for i in differ[:5]:
        print(f"   {texts[i]!r}\n   {ours[i].tolist()}\n   {theirs[i].tolist()}")


def main() -> None:
    import open_clip

    from vlm.weights.vocabularies import clip_tokenizer

    texts = strings(10_000)
    theirs = open_clip.SimpleTokenizer()(texts).numpy()
    report("open_clip SimpleTokenizer", clip_tokenizer(77)(texts), theirs, texts)
    huggingface(texts)
    siglip()
    bert()


def huggingface(texts: list[str]) -> None:
    """transformers' CLIPTokenizer over CLIP's own vocabulary, saved and loaded from a folder."""
    import json

    from etils import epath
    from transformers import CLIPTokenizer

    from vlm.config import ModelConfig, TextConfig
    from vlm.weights.vocabularies import huggingface_tokenizer

    packaged = json.loads((ROOT / "vlm/weights/clip/tokenizer.json").read_text())["model"]
    vocab = dict(packaged["vocab"])
    vocab["<|startoftext|>"] = vocab.pop("<start_of_text>")
    vocab["<|endoftext|>"] = vocab.pop("<end_of_text>")
    theirs = CLIPTokenizer(
        vocab=vocab, merges=[tuple(m) for m in packaged["merges"]], model_max_length=77
    )
    config = ModelConfig(text=TextConfig(vocab_size=49408, context_length=77))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = huggingface_tokenizer(epath.Path(folder), config)
    theirs = theirs(
        texts, padding="max_length", truncation=True, max_length=77, return_tensors="np"
    )
    report("transformers CLIPTokenizer", ours(texts), theirs["input_ids"], texts)


def siglip() -> None:
    """transformers' SiglipTokenizer over a SentencePiece model trained here.

    Without the strings that spell out "</s>": it makes a token of that, and we clean it as text.
    """
    import sentencepiece
    from etils import epath
    from transformers import SiglipTokenizer

    from vlm.config import ModelConfig, TextConfig
    from vlm.weights.vocabularies import huggingface_tokenizer

    texts = [text for text in strings(11_000) if "</s>" not in text]
    with tempfile.TemporaryDirectory() as folder:
        corpus = pathlib.Path(folder) / "corpus.txt"
        corpus.write_text(
            "\n".join(t.lower() for t in texts[6:] if t.isprintable() and len(t) < 300)
        )
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus), model_prefix=f"{folder}/spiece", vocab_size=9000, pad_id=-1,
            bos_id=-1, eos_id=1, unk_id=2, control_symbols="<pad>", character_coverage=0.99,
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
        theirs = SiglipTokenizer(f"{folder}/spiece.model")
        theirs.save_pretrained(folder)
        config = ModelConfig(text=TextConfig(vocab_size=theirs.vocab_size, context_length=64))
        ours = huggingface_tokenizer(epath.Path(folder), config)
        theirs = theirs(
            texts, padding="max_length", truncation=True, max_length=64, return_tensors="np"
        )
        report("transformers SiglipTokenizer", ours(texts), theirs["input_ids"], texts)


def bert() -> None:
    """transformers' BertTokenizer over a WordPiece vocabulary trained here.

    big_vision uses tensorflow_text's, which folds case and compatibility forms, parts words at
    control characters, and counts the bytes of long words (`tests/weights/make_lit_inputs.py`
    compares with that). Left out are the strings with a character that the two treat differently,
    and what is younger than Unicode 3.2 or beyond its first plane, for theirs has older tables.
    """
    import tokenizers
    from etils import epath
    from transformers import BertTokenizer

    from vlm.config import ModelConfig, TextConfig
    from vlm.inputs.cleaning import _CASE_FOLD
    from vlm.weights.vocabularies import bert_tokenizer

    def bare(text: str) -> str:
        text = unicodedata.normalize("NFD", text)
        return "".join(c for c in text if unicodedata.category(c) != "Mn")

    def alike(text: str) -> bool:
        ours = bare(text.translate(_CASE_FOLD))
        words = max(map(len, ours.encode().split()), default=0)
        others = {"Cc", "Cf", "Cn", "Co", "Zs", "Zl", "Zp"}
        return (
            ours == bare(text).lower()
            and words <= 100
            and max(text, default="") <= "\uffff"
            and all(c in " \t\n\r" or not {kind(c), old.category(c)} & others for c in text)
        )

    kind, old = unicodedata.category, unicodedata.ucd_3_2_0
    texts = [text for text in strings(90_000) if alike(text) and "\ufffd" not in text][:10_000]
    with tempfile.TemporaryDirectory() as folder:
        folder = epath.Path(folder)
        learner = tokenizers.BertWordPieceTokenizer(lowercase=True)
        learner.train_from_iterator(texts, vocab_size=3000, show_progress=False)
        learner.save_model(str(folder))
        size = learner.get_vocab_size()
        config = ModelConfig(text=TextConfig(vocab_size=size, context_length=512))
        ours = bert_tokenizer(folder / "model.npz", config)
        theirs = BertTokenizer.from_pretrained(str(folder), do_lower_case=True)
    rows = theirs(texts, padding="max_length", truncation=True, max_length=64)["input_ids"]
    # Theirs ends with [SEP] and ours does not.
    rows = [[i for i in row if i != theirs.sep_token_id][:16] for row in rows]
    rows = np.array([row + [0] * (16 - len(row)) for row in rows])
    report("transformers BertTokenizer", ours(texts), rows, texts)


if __name__ == "__main__":
    main()
