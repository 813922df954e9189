"""Live objects of the library `datasets` as `data.source`: read, shuffled and resumed exactly."""

import io
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.peers

sys.path.append(str(Path(__file__).parents[1] / "data"))

COUNT, CLASSES = 24, ["cat", "dog", "bird"]


@pytest.fixture(scope="module")
def made():
    datasets = pytest.importorskip("datasets")
    import kinds

    rows = {
        "image": [{"bytes": kinds.jpeg(n), "path": None} for n in range(COUNT)],
        "caption": [f"picture {n}" for n in range(COUNT)],
        "label": [n % 3 for n in range(COUNT)],
    }
    features = datasets.Features(
        image=datasets.Image(),
        caption=datasets.Value("string"),
        label=datasets.ClassLabel(names=CLASSES),
    )
    return datasets.Dataset.from_dict(rows, features=features)


def batches_of(source, index=0, count=1, **options):
    import kinds

    from vlm.config import DataConfig
    from vlm.data.pipeline import train_batches

    return train_batches(
        DataConfig(source=source, **({"eval_split": None, "prefetch": 0} | options)),
        kinds.PREPROCESS, kinds.TOKENIZER, batch_size=4 // count, seed=5,
        process_index=index, process_count=count,
    )  # fmt: skip


def test_a_data_set_is_read_encoded_with_the_names_of_its_classes(made):
    import kinds

    from vlm.config import DataConfig
    from vlm.data.sources import classes_of, open_source

    source = open_source(DataConfig(source=made), "train")
    assert source[3]["image"] == kinds.jpeg(3)
    labelled = DataConfig(source=made, label="label", eval_split=None)
    assert classes_of(labelled).labels == CLASSES
    assert open_source(labelled, "train")[4]["label"] == "dog"
    flipped = made.with_transform(
        lambda rows: rows | {"image": [np.asarray(image)[:, ::-1] for image in rows["image"]]}
    )
    image = open_source(DataConfig(source=flipped), "train")[3]["image"]
    expected = np.asarray(Image.open(io.BytesIO(kinds.jpeg(3))).convert("RGB"))[:, ::-1]
    np.testing.assert_array_equal(np.asarray(image), expected)
    split = made.train_test_split(4, shuffle=False)
    assert len(open_source(DataConfig(source=split), "test")) == 4


def test_batches_are_those_of_a_list(made):
    import kinds

    rows = [{"image": kinds.jpeg(n), "caption": f"picture {n}"} for n in range(COUNT)]
    for one, other in itertools.islice(zip(batches_of(made), batches_of(rows), strict=False), 8):
        np.testing.assert_array_equal(one["images"], other["images"])


@pytest.mark.parametrize("shuffled", [False, True])
def test_an_iterable_data_set_resumes_exactly_or_is_refused(made, shuffled):
    import kinds

    from vlm.errors import DataError

    def make(split):
        stream = made.to_iterable_dataset(num_shards=3)
        return stream.shuffle(seed=3, buffer_size=5) if shuffled else stream

    for source in (make, make("train")):
        iterator, states, batches = batches_of(source), [], []
        for _ in range(30):
            states.append(json.dumps(iterator.get_state()))
            batches.append(next(iterator))
        assert sorted(n for b in batches[:6] for n in kinds.numbers_of(b)) == list(range(COUNT))
        for start in (1, 6, 17, 20, 26):
            resumed = batches_of(source)
            resumed.set_state(json.loads(states[start]))
            if shuffled:  # the buffer of a shuffle is no part of the library's state
                with pytest.raises(DataError, match="does not repeat the elements before"):
                    next(resumed)
                continue
            for expected in batches[start : start + 3]:
                np.testing.assert_array_equal(next(resumed)["images"], expected["images"])


def test_two_processes_share_an_iterable_data_set(made):
    import kinds

    def make(split, process_index, process_count):
        return made.to_iterable_dataset(num_shards=4).shard(process_count, process_index)

    for source in (made.to_iterable_dataset(), make):
        parts = [batches_of(source, index, 2) for index in range(2)]
        seen = [[n for _ in range(6) for n in kinds.numbers_of(next(part))] for part in parts]
        assert sorted(seen[0] + seen[1]) == list(range(COUNT))
