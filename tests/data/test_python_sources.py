"""Data sets that a user gives in Python: read exactly, and refused with one sentence."""

import dataclasses
import io
import itertools
import json
import pickle

import grain
import kinds
import numpy as np
import pytest
import tensorflow_datasets as tfds
from kinds import PREPROCESS, TOKENIZER, numbers_of
from PIL import Image

from vlm.config import (
    AugmentConfig,
    DataConfig,
    EvalConfig,
    FieldFilter,
    MixturePart,
    from_dict,
    to_dict,
)
from vlm.data.example_reader import ExampleReader
from vlm.data.pipeline import count_examples, eval_batches, train_batches
from vlm.data.sources import (
    all_captions,
    classes_of,
    open_source,
    open_to_measure,
    split_names,
    streams,
    vocabulary_texts,
    with_own_splits,
)
from vlm.errors import ConfigError, DataError

COUNT, BATCH = 24, 4


def row(number: int) -> dict:
    return {"image": kinds.jpeg(number), "caption": f"picture {number}", "score": number / 10}


ROWS = [row(number) for number in range(COUNT)]


class Rows:
    """A data set with `len` and `[]`, as torch has them."""

    def __init__(self, rows=ROWS):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class Forever:
    """An iterable without a state, in an order of its seed."""

    def __init__(self, seed: int | None = 0):
        self.seed = seed

    def __iter__(self):
        rng = np.random.default_rng(self.seed)
        while True:
            yield ROWS[rng.integers(COUNT)]


class WithState:
    """An iterable whose iterator has a state of bytes."""

    def __iter__(self):
        return StateIterator()


class StateIterator:
    def __init__(self):
        self.at = 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == COUNT:
            raise StopIteration
        self.at += 1
        return ROWS[self.at - 1]

    def get_state(self) -> bytes:
        return bytes([self.at])

    def set_state(self, state: bytes) -> None:
        self.at = state[0]


def generated(split: str):
    yield from ROWS


def by_process(split: str, process_index: int, process_count: int):
    mine = ROWS[process_index::process_count]
    return grain.MapDataset.source(mine).shuffle(seed=process_index).repeat().to_iter_dataset(LIGHT)


def mapped():
    return grain.MapDataset.source(ROWS).shuffle(seed=7)


LIGHT = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


def filtered():
    return mapped().filter(lambda row: row["score"] < 1.2).repeat()


OBJECTS = {
    "list": lambda: ROWS,
    "sequence": Rows,
    "grain": mapped,
    "grain, filtered": filtered,
    "grain, at random": mapped,
    "grain iterator": lambda: filtered().to_iter_dataset(LIGHT),
    "grain iterator, shuffled in a window": lambda: grain.experimental.WindowShuffleIterDataset(
        mapped().to_iter_dataset(LIGHT), window_size=6, seed=3
    ),
    "iterator by process": lambda: by_process,
    "iterable with a state": WithState,
    "iterable without a state": Forever,
    "generator function": lambda: generated,
}
FIRST_TIER = ("grain", "iterable with a state")
KINDS = [
    pytest.param(kind, marks=() if kind in FIRST_TIER else pytest.mark.slow) for kind in OBJECTS
]
ITERATED = [name for name in OBJECTS if "itera" in name or "generator" in name]


def config(source, **options) -> DataConfig:
    given = {"eval_split": None, "prefetch": 0, "augment": AugmentConfig(flip=True, jitter=0.3)}
    return DataConfig(source=source, **(given | options))


def of_kind(kind: str) -> DataConfig:
    return config(OBJECTS[kind](), access="random" if "random" in kind else "auto")


def batches_of(data: DataConfig, index: int = 0, count: int = 1):
    return train_batches(
        data, PREPROCESS, TOKENIZER, batch_size=BATCH // count, seed=5,
        process_index=index, process_count=count,
    )  # fmt: skip


def first(data: DataConfig):
    iterator = batches_of(data)
    batch = next(iterator)
    iterator.close()
    return batch


def assert_same(batch, expected):
    for name in ("images", "tokens"):
        np.testing.assert_array_equal(batch[name], expected[name], err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_has_the_same_batches(kind):
    steps = 24  # through several epochs, and a block of states
    iterator, states, batches = batches_of(of_kind(kind)), [], []
    for _ in range(steps):
        states.append(json.dumps(iterator.get_state()))
        batches.append(next(iterator))
    iterator.close()
    for start in (0, 5, 20):
        resumed = batches_of(of_kind(kind))
        resumed.set_state(json.loads(states[start]))
        for expected in batches[start : start + 3]:
            assert_same(next(resumed), expected)
        assert json.dumps(resumed.get_state()) == states[start + 3]
        resumed.close()


@pytest.mark.parametrize("kind", KINDS)
def test_processes_read_what_one_reads(kind):
    alone = batches_of(of_kind(kind))
    parts = [batches_of(of_kind(kind), index, 2) for index in range(2)]
    for _ in range(8):
        whole, rows = numbers_of(next(alone)), [numbers_of(next(part)) for part in parts]
        if kind == "iterator by process":
            assert {n % 2 for n in rows[0]} == {0}
            assert {n % 2 for n in rows[1]} == {1}
        elif kind not in ITERATED:
            assert rows[0] + rows[1] == whole
        else:
            assert sorted(rows[0] + rows[1]) == sorted(whole)
    state = parts[0].get_state()
    if "lanes" in state:  # as a checkpoint of all processes has them
        state["lanes"] = {k: v for part in parts for k, v in part.get_state()["lanes"].items()}
    for index, part in enumerate(parts):
        again = batches_of(of_kind(kind), index, 2)
        again.set_state(json.loads(json.dumps(state)))
        assert_same(next(again), next(part))
        again.close()
    if kind in ITERATED:
        with pytest.raises(DataError, match=r"has 2 lanes .* resume with as many processes"):
            alone.set_state(state)
    for iterator in [alone, *parts]:
        iterator.close()


def test_an_object_is_read_as_fast_as_a_list_and_shuffled_by_vlm():
    """Lists, sequences and grain data sets at random have the order of any other source."""
    expected = first(config(ROWS))
    for source in (Rows(), tuple(ROWS), mapped(), lambda split: ROWS, {"train": ROWS, "test": []}):
        numbers = numbers_of(first(config(source, access="random")))
        assert len(set(numbers)) == BATCH
        if not isinstance(source, grain.MapDataset):
            assert_same(first(config(source)), expected)


def test_a_grain_data_set_keeps_its_order_and_repeats_with_new_seeds():
    iterator, own = batches_of(config(mapped())), mapped().repeat()
    assert iterator.description == (
        "24 elements, repeated; in the order of the grain data set, not shuffled by vlm"
    )
    for step in range(12):
        expected = [own[i]["caption"] for i in range(step * BATCH, (step + 1) * BATCH)]
        assert [f"picture {n}" for n in numbers_of(next(iterator))] == expected
    iterator.close()


def test_an_image_in_every_form(tmp_path):
    picture = Image.open(io.BytesIO(kinds.jpeg(3))).convert("RGB")
    palette, clear = picture.convert("P"), picture.copy()
    clear.putalpha(255)
    picture.save(tmp_path / "3.png")
    encoded = (tmp_path / "3.png").read_bytes()
    forms = {
        "PIL": picture, "alpha": clear, "array": np.asarray(picture), "bytes": encoded,
        "path": tmp_path / "3.png", "text": str(tmp_path / "3.png"), "buffer": bytearray(encoded),
        "Hugging Face": {"bytes": encoded, "path": None}, "file": Image.open(tmp_path / "3.png"),
        "bytes of an array": np.array(encoded, object),
    }  # fmt: skip
    plain = AugmentConfig(crop=None)
    expected = None
    for form, image in forms.items():
        data = config([{"image": image, "caption": "picture 3"}], augment=plain)
        for batch_of in (lambda d: first_one(d)["images"], lambda d: evaluated(d)):
            images = batch_of(data)
            expected = images if expected is None else expected
            np.testing.assert_array_equal(images, expected, err_msg=form)
    grey = first_one(config([{"image": palette, "caption": "picture 3"}], augment=plain))
    assert grey["images"].shape == expected.shape


def first_one(data):
    iterator = train_batches(data, PREPROCESS, TOKENIZER, batch_size=1, seed=0)
    batch = next(iterator)
    iterator.close()
    return batch


def evaluated(data):
    return next(eval_batches(data, PREPROCESS, TOKENIZER, batch_size=1, split="train"))["images"]


def test_a_picture_of_a_user_stays_whole():
    """A JPEG file that is opened but not loaded is not reduced for one crop, and so for all."""
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "JPEG")
    picture = Image.open(io.BytesIO(out.getvalue()))
    rotated = Image.open(io.BytesIO(out.getvalue()))
    rotated.getexif()[0x0112] = 6
    for image in (picture, rotated):
        data = config([{"image": image, "caption": "picture 3"}])
        batches = [first_one(data)["images"] for _ in range(2)]
        np.testing.assert_array_equal(*batches)
        cached = first_one(dataclasses.replace(data, cache=True))
        np.testing.assert_array_equal(cached["images"], batches[0])
    assert picture.size == (256, 256)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", "b")], r"example 0 of python:<a list> train is a tuple: return a dict such as"),
        ([{"picture": 1, "caption": "a"}], "has no feature 'image' that data.image names: it has"),
        ([{"image": b"", "text": "a"}], "has no feature 'caption' that data.captions names"),
        (
            [{"image": np.zeros((4, 4, 3), np.float32), "caption": "a"}],
            "the image of example 0 of .* is an array of float32, not uint8: scale it to 0..255",
        ),
        (
            [{"image": np.zeros((2, 4, 4, 3), np.uint8), "caption": ["a"] * 2}],
            "is a batch of 2 images: give one image in each element",
        ),
        (
            [{"image": np.zeros((3, 4, 5), np.uint8), "caption": "a"}],
            r"has shape \(3, 4, 5\): give \(height, width\)",
        ),
        ([{"image": 3, "caption": "a"}], "is a int: give a PIL image, a path"),
        ([], "has no examples"),
    ],
)
def test_an_element_that_is_not_an_example_is_refused(rows, message):
    for source in (rows, Rows(rows), lambda split: iter(rows)):
        logged = message
        if callable(source):
            logged = logged.replace("example 0", "element 0").replace("<a list>", ".*")
            logged = logged.replace("no examples", "no elements")
        elif isinstance(source, Rows):
            logged = logged.replace("a list", "a Rows")
        with pytest.raises(DataError, match=logged) as caught:
            train_batches(config(source), PREPROCESS, TOKENIZER, batch_size=1, seed=0)
        assert "\n" not in str(caught.value)


class Failing(Rows):
    def __getitem__(self, index):
        if index == 5:
            raise ValueError("no such\nrecord")
        return super().__getitem__(index)


def test_an_exception_of_a_user_names_its_example():
    wanted = r"of python:.* train raised ValueError \(no such\): correct it, or"
    iterator = batches_of(config(Failing()))
    with pytest.raises(DataError, match="example 5 " + wanted) as caught:
        list(itertools.islice(iterator, COUNT))
    assert isinstance(caught.value.__cause__, ValueError)

    def failing(split):
        yield from ROWS[:5]
        raise ValueError("no such\nrecord")

    iterator = batches_of(config(failing))
    with pytest.raises(DataError, match="element 5 " + wanted):
        list(itertools.islice(iterator, COUNT))


def test_an_element_that_is_none_is_replaced():
    iterator = batches_of(config([None, *ROWS]))
    for _ in range(8):
        next(iterator)
    assert iterator.bad.kinds.keys() == {"no example"}
    iterator.close()


class NoState(Forever):
    """Another order each time, which no checkpoint can restore."""

    def __init__(self):
        super().__init__(None)


def test_an_order_that_does_not_repeat_is_not_resumed():
    iterator = batches_of(config(NoState()))
    assert "a resumed run reads up to its position" in iterator.description
    for _ in range(5):
        next(iterator)
    resumed = batches_of(config(NoState()))
    resumed.set_state(iterator.get_state())
    with pytest.raises(DataError, match="does not repeat the elements before the checkpoint"):
        next(resumed)


def test_what_can_be_read_once_is_refused():
    for source in (generated("train"), iter(mapped().to_iter_dataset()), iter(ROWS)):
        with pytest.raises(DataError, match="can be read only once"):
            batches_of(config(source))


class OddState(WithState):
    def __iter__(self):
        iterator = StateIterator()
        iterator.get_state = lambda: {1j}
        return iterator


def test_a_state_that_is_not_json_is_refused():
    with pytest.raises(DataError, match="is a set that is not JSON"):
        batches_of(config(OddState()))


def test_options_that_an_order_cannot_follow_are_refused():
    grains, iterable = mapped(), WithState()
    for source, options, message in (
        (iterable, {"workers": 2}, "data.workers 2 cannot share the one iterator"),
        (iterable, {"interleave": 2}, "interleave is 2 and has no effect"),
        (grains, {"shuffle": 5}, "shuffle is 5 and has no effect"),
        (ROWS, {"access": "stream"}, "or a grain data set"),
        (grains, {"hold_out": 0.2, "eval_split": "test"}, "no part can be held out"),
        (grains, {"cache": True}, "data.cache needs a data set of finite size"),
        (iterable, {"access": "random"}, "is an iterable, which is read in order only"),
        (filtered(), {"access": "random"}, r"is endless.* leave out .repeat\(\)"),
        (len, {}, "is a int, which has neither len"),
        (lambda split: 1 / 0, {}, r"with split='train' raised ZeroDivisionError \(division by"),
        (lambda split: None, {}, "is None, and not a data set"),
        (lambda split: 3, {}, "is a int, which has neither len"),
        ("python:no_such_module:rows", {}, "there is no module 'no_such_module'"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            batches_of(config(source, **options))
    for source in (None, 3, b"data"):
        with pytest.raises(ConfigError, match="give the name of a source as a str, or a data set"):
            DataConfig(source=source)
    parts = (MixturePart(source=iterable), MixturePart(source=ROWS))
    with pytest.raises(ConfigError, match="is an iterable, which has no random access"):
        batches_of(config("", mixture=parts))


def test_parts_of_a_mixture():
    parts = (MixturePart(source=mapped(), weight=1), MixturePart(source=Rows(ROWS[:3]), weight=1))
    iterator = batches_of(config("", mixture=parts))
    numbers = [n for _ in range(16) for n in numbers_of(next(iterator))]
    iterator.close()
    assert 0.3 < np.mean(np.array(numbers) < 3) < 0.8


SPLITS = {"train": ROWS[:20], "val": Rows(ROWS[20:])}


def make(split: str, first: int = 0):
    return SPLITS[split][first:] if split == "train" else SPLITS[split]


def everything():
    return SPLITS


def test_splits():
    for source in (SPLITS, make, everything):
        data = config(source, eval_split="val")
        assert len(open_source(data, "train")) == 20
        assert len(open_source(data, "val")) == 4
        assert all_captions(data) == [f"picture {n}" for n in range(COUNT)]
        assert split_names(data) == ([] if source is make else ["train", "val"])
    assert len(open_source(config(SPLITS), "validation")) == 4
    assert open_to_measure(config(SPLITS), None)[1] == "val"
    assert open_to_measure(config(ROWS), None)[1] == "all"
    with pytest.raises(DataError, match="name a split"):
        open_to_measure(config(make), None)
    with pytest.raises(DataError, match=r"split='test' raised KeyError .* set eval_split=None"):
        open_source(config(make), "test")
    with pytest.raises(DataError, match="has no split 'test': it has train, val"):
        open_source(config(SPLITS), "test")
    for source in (ROWS, lambda: ROWS):
        with pytest.raises(DataError, match="one data set without splits, so there is no split"):
            open_source(config(source), "test")


def test_a_single_data_set_has_no_eval_split(caplog):
    for source in (ROWS, {"train": ROWS}):
        data = with_own_splits(DataConfig(source=source))
        assert data.eval_split is None
        assert "has no eval split, so there is no held-out evaluation" in caplog.text
        caplog.clear()
    for data in (
        DataConfig(source=SPLITS),
        DataConfig(source=make),
        DataConfig(source=ROWS, eval_split="val"),
        DataConfig(source=ROWS, hold_out=0.2),
        DataConfig("photos/"),
    ):
        assert with_own_splits(data) == data
    assert not caplog.text
    held = DataConfig(source=ROWS, hold_out=0.25)
    assert [len(open_source(held, split)) for split in ("train", "test")] == [18, 6]


def test_functions_are_called_once_for_a_split():
    calls = []

    def counted(split):
        calls.append(split)
        return ROWS

    data = config(counted)
    for _ in range(3):
        open_source(dataclasses.replace(data, prefetch=1), "train")
        open_source(data, "test")
    assert calls == ["train", "test"]


def test_filters_labels_and_counts():
    high = (FieldFilter("score", at_least=2.0),)
    for source in (ROWS, mapped(), WithState()):
        iterator = batches_of(config(source, filters=high))
        assert {n for _ in range(6) for n in numbers_of(next(iterator))} == {20, 21, 22, 23}
        iterator.close()
    assert count_examples(config(ROWS)) == count_examples(config(mapped())) == COUNT
    for source in (filtered(), WithState()):
        with pytest.raises(ConfigError, match="number of examples is unknown"):
            count_examples(config(source))
    for source in (ROWS, mapped()):
        assert sorted(vocabulary_texts(config(source)))[0] == "picture 0"
    with pytest.raises(ConfigError, match="a stream cannot be read in advance"):
        vocabulary_texts(config(WithState()))
    assert streams(config(mapped()))
    assert not streams(config(mapped(), access="random"))
    rows = [{"image": b"", "label": np.str_("dcb"[i % 3])} for i in range(6)]
    assert classes_of(config(rows, label="label")).labels == ["b", "c", "d"]
    with_names = Rows([r | {"label": "cat"} for r in rows])
    with_names.label_names = ["dog", "cat"]
    assert classes_of(config(with_names, label="label")).labels == ["dog", "cat"]


def test_the_reader_of_statistics_and_preparation_reads_all():
    for source in (ROWS, mapped(), WithState(), generated):
        reader = ExampleReader(config(source), "train")
        examples = [read.example["caption"] for read in reader.read()]
        assert sorted(examples) == sorted(row["caption"] for row in ROWS)
        again = [read.example["caption"] for read in reader.read([10])]
        assert again == examples[10:]
        parts = itertools.chain(*(reader.read(*part) for part in reader.ranges(5)))
        assert [read.example["caption"] for read in parts] == examples


class Numbered(tfds.core.GeneratorBasedBuilder):
    """Numbered pictures with two captions and a class."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "captions": tfds.features.Sequence({"text": tfds.features.Text()}),
                    "label": tfds.features.ClassLabel(names=["odd one", "even one"]),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 8), "test": self._generate_examples(8, 12)}

    def _generate_examples(self, first, end):
        for n in range(first, end):
            texts = [{"text": f"picture {n}"}, {"text": f"it is {n}"}]
            yield n, {"image": kinds.jpeg(n), "captions": texts, "label": n % 2}


def test_tfds(tmp_path):
    tfds.disable_progress_bar()
    builder = Numbered(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    texts = ("captions/text",)
    parts = {split: builder.as_data_source(split) for split in ("train", "test")}
    by_name = open_source(config(f"tfds:{builder.data_dir}", captions=texts), "train")
    for source in (builder, parts):
        data = config(source, captions=texts, eval_split="test")
        assert sorted(split_names(data)) == ["test", "train"]
        assert len(open_source(data, "test")) == 4
        opened = open_source(data, "train")
        assert opened[3]["captions/text"] == by_name[3]["captions/text"]
        assert len(all_captions(data)) == 12
        iterator = batches_of(data)
        next(iterator)
        iterator.close()
        labelled = config(source, label="label")
        assert classes_of(labelled).labels == ["odd one", "even one"]
        assert {open_source(labelled, "train")[i]["label"] for i in range(8)} == {
            "odd one", "even one",
        }  # fmt: skip


def test_import_paths(tmp_path, monkeypatch):
    (tmp_path / "own_rows.py").write_text(
        "import grain\n"
        "def make(split, count=4):\n"
        "    return [{'image': b'', 'caption': f'{split} {i}'} for i in range(count)]\n"
        "data = grain.MapDataset.source(make('grain'))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for path, count in (("make", 4), ("make(count=6)", 6), ("data", 4)):
        data = config(f"python:own_rows:{path}")
        assert from_dict(DataConfig, json.loads(json.dumps(to_dict(data)))) == data
        source = open_source(data, "train")
        assert len(source) == count
        copied = pickle.loads(pickle.dumps(source))
        assert dict(copied[2]) == dict(source[2])
    import own_rows

    assert config(own_rows.make).source == "python:own_rows:make"
    assert EvalConfig(source=own_rows.make).source == "python:own_rows:make"
    lost = from_dict(DataConfig, to_dict(config(ROWS)))
    assert lost == config(ROWS)
    with pytest.raises(ConfigError, match=r"data\.source was <a list>, which has no import path"):
        open_source(lost, "train")
    monkeypatch.setattr(own_rows, "make", lambda split: [{"image": b"", "caption": "a"}])
    sent = pickle.dumps(source := open_source(config("python:own_rows:data"), "train"))
    monkeypatch.setattr(own_rows, "data", own_rows.data.slice(slice(2)))
    with pytest.raises(DataError, match="2 examples in a reader process, and 4 in the run"):
        pickle.loads(sent)
    assert len(source) == 4


class Unsendable(Rows):
    def __reduce__(self):
        raise TypeError("cannot pickle 'file'")


@pytest.mark.slow
def test_reader_processes():
    for source in (Rows(), mapped()):
        alone, shared = batches_of(config(source)), batches_of(config(source, workers=2))
        for _ in range(3):
            assert_same(next(shared), next(alone))
        for iterator in (alone, shared):
            iterator.close()


def test_what_cannot_be_sent_to_a_process_is_refused():
    with pytest.raises(DataError, match=r"sent to the 2 processes of data\.workers"):
        batches_of(config(Unsendable(), workers=2))
