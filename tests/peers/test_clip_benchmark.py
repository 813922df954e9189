"""CLIP_benchmark and vlm measure one model on the same shards.

    python tests/peers/test_clip_benchmark.py        the 38 data sets of 50 images, and a table

A small random open_clip model in float32 is evaluated by CLIP_benchmark's own functions, and by vlm
from the same folder with images decoded as the reference does.
"""

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

pytestmark = pytest.mark.peers
SOME = (
    "imagenet-a", "voc2007_multilabel", "mnist", "renderedsst2", "vtab/caltech101",
    "vtab/dsprites_label_orientation", "vtab/kitti_closest_vehicle_distance", "flickr30k",
)  # fmt: skip
SIZES = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 48, "layers": 2, "width": 48, "head_width": 16, "patch_size": 12},
    "text_cfg": {
        "context_length": 24, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 1,
    },
}  # fmt: skip


def write_model(folder: Path) -> str:
    """A small open_clip model with larger weights, so that its embeddings lie far from each other.

    Those of attention stay: larger ones would let each token look at one other alone, and texts
    that differ in one word would tie.
    """
    import open_clip
    import safetensors.torch
    import torch

    torch.manual_seed(0)
    model = open_clip.CLIP(**SIZES)
    with torch.no_grad():
        model.token_embedding.weight.mul_(30)
        for name, weight in model.named_parameters():
            if weight.ndim >= 2 and "embedding" not in name and "in_proj" not in name:
                weight.mul_(2.5)
    folder.mkdir()
    about = {"model_cfg": SIZES, "preprocess_cfg": {"resize_mode": "shortest"}}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    safetensors.torch.save_file(state, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def measured_by_vlm(bundle, root: Path) -> dict[str, float]:
    """The same of vlm, under CLIP_benchmark's names."""
    from vlm.evaluation.results_folder import clip_benchmark_fields
    from vlm.evaluation.runner import measure
    from vlm.evaluation.suites import Missing, open_task

    task = open_task(f"wds:{root}")
    assert not isinstance(task, Missing), task.why
    result = measure(bundle, task)
    assert result.provenance.evidence["decode"] == "reference"
    return clip_benchmark_fields(result)["metrics"]


class Compared:
    """A small open_clip model, and vlm's of the same files."""

    def __init__(self, folder: Path):
        import open_clip

        from vlm.bundle import load

        name = write_model(folder)
        network, _, self.transform = open_clip.create_model_and_transforms(name)
        self.network, self.tokenizer = network.eval(), open_clip.get_tokenizer(name)
        self.bundle = load(folder, decode="reference")

    def measure(self, root: Path) -> dict[str, tuple[float, float]]:
        """The value of each metric of CLIP_benchmark at `root`, and vlm's."""
        from peer_metrics import clip_benchmark_metrics

        theirs = clip_benchmark_metrics(self.network, self.transform, self.tokenizer, root)
        ours = measured_by_vlm(self.bundle, root)
        known = {name: value for name, value in theirs.items() if not np.isnan(value)}
        assert set(known) <= set(ours), (known, ours)
        return {name: (value, ours[name]) for name, value in known.items()}

    def likely(self, made) -> list[int]:
        """A class for each image among those that the model ranks highest, so that some are right.

        At random, none of 50 images in a thousand classes would be.
        """
        import torch
        from clip_benchmark.metrics.zeroshot_classification import zero_shot_classifier
        from PIL import Image

        with contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
            classes = zero_shot_classifier(
                self.network, self.tokenizer, made.classes, made.templates, "cpu", amp=False
            )
            pixels = torch.stack(
                [self.transform(Image.open(file).convert("RGB")) for file in made.files]
            )
            order = (self.network.encode_image(pixels) @ classes).argsort(1, descending=True)
        ranks = made.rng.geometric(0.3, len(made.files)) - 1
        return [int(order[i, rank % order.shape[1]]) for i, rank in enumerate(ranks)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    pytest.importorskip("clip_benchmark")
    return Compared(tmp_path_factory.mktemp("model") / "small")


@pytest.mark.parametrize("name", SOME)
def test_both_measure_the_same(name, model, tmp_path):
    from clip_benchmark_sets import write

    found = model.measure(write(name, tmp_path, choose=model.likely))
    assert found
    for metric, (theirs, ours) in found.items():
        assert ours == pytest.approx(theirs, abs=1e-6), metric


def test_the_lists_of_classes_are_those_of_the_package():
    pytest.importorskip("clip_benchmark")
    from known_classes import FILE, read

    assert json.loads(FILE.read_text()) == read()


def remember_classes() -> None:
    """Embed the classes of ImageNet once on each side: four data sets ask for them."""
    from clip_benchmark.metrics import zeroshot_classification as theirs

    from vlm.evaluation import tasks as ours

    def remembering(made, key):
        found = {}

        def embeddings(*args, **options):
            name = key(*args)
            if name not in found:
                found[name] = made(*args, **options)
            return found[name]

        return embeddings

    theirs.zero_shot_classifier = remembering(
        theirs.zero_shot_classifier,
        lambda _, __, classes, templates, *___: str((classes, templates)),
    )
    ours.class_embeddings = remembering(ours.class_embeddings, lambda _, prompts: str(prompts))


def without_tolerance(model: Compared, root: Path, metric: str) -> float:
    """A metric of vlm where only equal cosines are ties, which count as misses in vlm."""
    from vlm.evaluation import metrics

    with mock.patch.object(metrics, "TIE", 0.0):
        return measured_by_vlm(model.bundle, root)[metric]


def main() -> None:
    from clip_benchmark_sets import names_of_38, write

    remember_classes()
    largest, ties = 0.0, []
    with tempfile.TemporaryDirectory() as held:
        model = Compared(Path(held) / "model")
        print(f"{'data set':40}{'metric':28}{'CLIP_benchmark':>15}{'vlm':>10}{'difference':>12}")
        for data in names_of_38():
            root = write(data, Path(held), choose=model.likely)
            found = model.measure(root)
            for metric, (theirs, ours) in found.items():
                largest = max(largest, abs(theirs - ours))
                row = f"{theirs:15.4f}{ours:10.4f}{ours - theirs:12.1e}"
                print(f"{data:40}{metric:28}{row}", flush=True)
                if abs(theirs - ours) > 1e-6:
                    ties.append((data, metric, theirs, without_tolerance(model, root, metric)))
    print(f"largest difference {largest:.1e}")
    for data, metric, theirs, ours in ties:
        print(f"{data} {metric}: {ours - theirs:.1e} where cosines closer than 1e-6 are no ties")


if __name__ == "__main__":
    main()
