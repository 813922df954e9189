"""Writes CLIP's vocabulary, `vlm/weights/clip/tokenizer.json`, from open_clip's merges file.

Run with the extra `peers` installed: python tests/weights/make_clip_vocabulary.py
"""

import gzip
import importlib.util
import pathlib

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

# OpenAI's regular expression, which follows the case-insensitive search for special tokens.
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
SPECIALS = ["<start_of_text>", "<end_of_text>"]


def bytes_to_unicode() -> dict[int, str]:
    """The printable character that stands for each byte, in the order of the vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def main() -> None:
    package = pathlib.Path(importlib.util.find_spec("open_clip").origin).parent
    packed = (package / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    symbols = list(bytes_to_unicode().values())
    tokens = symbols + [s + "</w>" for s in symbols] + ["".join(pair) for pair in merges] + SPECIALS
    vocabulary = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            end_of_word_suffix="</w>",
        )
    )
    vocabulary.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    vocabulary.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    vocabulary.add_special_tokens(SPECIALS)
    out = pathlib.Path(__file__).parents[2] / "vlm" / "weights" / "clip" / "tokenizer.json"
    out.write_text(vocabulary.to_str())
    print(f"{vocabulary.get_vocab_size():,} tokens")


if __name__ == "__main__":
    main()
