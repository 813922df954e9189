"""Write vlm/data/class_lists/classes.json from the installed CLIP_benchmark (extra `peers`).

    python tests/peers/known_classes.py

`tests/peers/test_clip_benchmark.py` holds the file against the package.
"""

import importlib.util
import json
import re
from pathlib import Path

FILE = Path(__file__).parents[2] / "vlm" / "data" / "class_lists" / "classes.json"


def read() -> dict:
    """Class names, templates, WordNet ids and subsets of ImageNet as the package has them.

    They are read from its files and source, without importing it.
    """
    spec = importlib.util.find_spec("clip_benchmark")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "datasets"
    source = (folder / "builder.py").read_text()

    def listed(name: str) -> list[str]:
        found = re.search(rf"{name} = ([\[{{][^\]}}]*[\]}}])", source)
        assert found is not None, name
        return re.findall(r"n\d{8}", found[1])

    ids = listed("all_imagenet_wordnet_ids")
    subsets = {
        f"imagenet-{letter}": sorted(map(ids.index, set(listed(f"imagenet_{letter}_wnids"))))
        for letter in "aro"
    }
    templates = json.loads((folder / "en_zeroshot_classification_templates.json").read_text())
    del templates["dummy"]
    return {
        "names": json.loads((folder / "en_classnames.json").read_text()),
        "templates": templates,
        "wordnet_ids": ids,
        "imagenet_subsets": subsets,
    }


def main() -> None:
    lines = []
    for key, held in read().items():
        if isinstance(held, dict):
            inner = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in held.items())
            lines.append(f"{json.dumps(key)}: {{\n{inner}\n}}")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(held)}")
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{FILE}: {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
