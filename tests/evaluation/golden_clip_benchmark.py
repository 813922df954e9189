"""Write golden/clip_benchmark: small made data sets, and what CLIP_benchmark measures on them.

    python tests/evaluate/golden_clip_benchmark.py     (with the extra `peers`)

The model is the toy of test_clip_benchmark_figures.py, whose arithmetic both sides do alike.
"""

import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "peers"), str(HERE)]

NAMES = ("vtab/eurosat", "voc2007_multilabel", "flickr30k", "renderedsst2")


def main() -> None:
    import torch
    from clip_benchmark_sets import write
    from open_clip.transform import image_transform
    from peer_metrics import clip_benchmark_metrics
    from test_clip_benchmark_figures import GOLDEN, SIDE, image_weights, text_row

    class Model:
        def encode_image(self, images):
            return images.reshape(len(images), -1) @ torch.tensor(image_weights())

        def encode_text(self, texts):
            return texts

    def tokenizer(texts):
        return torch.tensor([text_row(text).tolist() for text in texts])

    shutil.rmtree(GOLDEN, ignore_errors=True)
    transform = image_transform(SIDE, is_train=False, mean=(0.5,) * 3, std=(0.5,) * 3)
    expected = {}
    for name in NAMES:
        root = write(name, GOLDEN, count=12, shards=2 if "eurosat" in name else 1, side=20)
        found = clip_benchmark_metrics(Model(), transform, tokenizer, root)
        expected[root.name] = {metric: value for metric, value in found.items() if value == value}
    (GOLDEN / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    size = sum(file.stat().st_size for file in GOLDEN.rglob("*") if file.is_file())
    print(f"{GOLDEN}: {size:,} bytes")


if __name__ == "__main__":
    main()
