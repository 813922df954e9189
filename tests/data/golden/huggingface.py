"""Write the files here with the library `datasets`: python tests/data/golden/huggingface.py FOLDER

`rows.json` holds what the library itself reads from them.
"""

import datetime
import io
import json
import sys
from pathlib import Path

from PIL import Image

COUNT = 6
CLASSES = ["tabby cat", "dog", "unseen"]


def picture(value: int) -> Image.Image:
    return Image.new("RGB", (3, 2), (value, 10 * value, 0))


def png(value: int) -> bytes:
    out = io.BytesIO()
    picture(value).save(out, "PNG")
    return out.getvalue()


def rows(first: int, images: Path | None) -> list[dict]:
    """Rows with every kind of image: PIL, bytes, bytes with a name, none; a path into `images`."""
    made = []
    for n in range(first, first + COUNT):
        image = [
            picture(n),
            {"bytes": png(n), "path": "elsewhere.png"},
            {"bytes": png(n), "path": None},
            None,
        ]
        if images is not None:
            (images / f"{n}.png").write_bytes(png(n))
            image.append({"bytes": None, "path": str(images / f"{n}.png")})
        made.append(
            {
                "image": image[n % len(image)],
                "label": [0, 1, None][n % 3],
                "labels": [0, n % 3],
                "caption": None if n == 4 else f"Käse {n}\u2028two",
                "captions": [f"one {n}", None, f"two {n}"][: n % 4],
                "long": f"long {n}",
                "sentences": [{"raw": f"raw {n}.{i}", "id": i} for i in range(n % 3)],
                "info": {"text": {"en": f"en {n}", "de": None}, "score": n / 2},
                "translation": {"en": f"a {n}", "fr": f"un {n}"},
                "when": datetime.datetime(2024, 1, n + 1),
            }
        )
    return made


def features():
    from datasets import ClassLabel, Features, Image, List, Value

    text = Value("string")
    return Features(
        {
            "image": Image(),
            "label": ClassLabel(names=CLASSES),
            "labels": List(ClassLabel(names=CLASSES)),
            "caption": text,
            "captions": List(text),
            "long": Value("large_string"),
            "sentences": List({"raw": text, "id": Value("int32")}),
            "info": {"text": {"en": text, "de": text}, "score": Value("float32")},
            "translation": {"en": text, "fr": text},
            "when": Value("timestamp[ns]"),
        }
    )


def write(folder: Path, images: Path | None = None):
    """Shards as `push_to_hub` names them, and a saved DatasetDict."""
    import datasets

    def made(first):
        return datasets.Dataset.from_list(rows(first, images), features=features())

    train, test = made(0), made(COUNT)
    for shard in range(2):
        path = folder / "data" / f"train-{shard:05d}-of-00002.parquet"
        train.shard(2, shard, contiguous=True).to_parquet(path)
    test.to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    datasets.DatasetDict(train=train, test=test).save_to_disk(folder / "saved")
    return {"train": train, "test": test}


def plain(dataset, index: int) -> dict:
    """A row as the library reads it, under our names of features."""
    row = dataset[index]
    names = dataset.features["label"].int2str
    image = row["image"]
    return {
        "image": None if image is None else list(image.convert("RGB").getpixel((0, 0))),
        "label": None if row["label"] is None else names(row["label"]),
        "labels": [names(label) for label in row["labels"]],
        **{name: row[name] for name in ("caption", "captions", "long")},
        "sentences/raw": [item["raw"] for item in row["sentences"]],
        "info/text/en": row["info"]["text"]["en"],
        "info/text/de": row["info"]["text"]["de"],
        "info/score": row["info"]["score"],
        "translation/en": row["translation"]["en"],
        "translation/fr": row["translation"]["fr"],
    }


def plain_example(example: dict) -> dict:
    """The same of an example that vlm reads."""
    image = example["image"]
    if image is not None:
        image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
        image = list(image.convert("RGB").getpixel((0, 0)))
    lists = {"sentences/raw": example.get("sentences/raw", [])}  # a feature of no sentence is none
    names = ("label", "labels", "caption", "captions", "long", "info/score")
    texts = ("info/text/en", "info/text/de", "translation/en", "translation/fr")
    return {"image": image, **lists, **{name: example[name] for name in (*names, *texts)}}


if __name__ == "__main__":
    out = Path(sys.argv[1]).absolute()
    found = write(out)
    read = {name: [plain(set_, i) for i in range(COUNT)] for name, set_ in found.items()}
    (out / "rows.json").write_text(json.dumps(read, indent=1) + "\n")
