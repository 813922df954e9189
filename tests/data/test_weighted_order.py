"""Examples drawn in proportion to a column, and mixtures weighted by the sizes of their parts."""

import collections
import dataclasses
import json
from pathlib import Path

import kinds
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm.cli import data as command
from vlm.config import DataConfig, FieldFilter, MixturePart, PreprocessConfig
from vlm.data.pipeline import TrainIterator, train_batches
from vlm.data.sources import open_source, open_stream
from vlm.data.weighted_order import Order, order_of
from vlm.errors import ConfigError, DataError
from vlm.inputs.preprocess import Preprocess
from vlm.inputs.tokenizer import train_bpe

# ------------------------------------------------------------------------------------- the order


def counts(order: Order, epoch: int, seed: int = 0) -> np.ndarray:
    """How often each example is in an epoch."""
    positions = np.arange(epoch * order.count, (epoch + 1) * order.count)
    return np.bincount(order.places(seed, positions), minlength=order.count)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=40).filter(lambda w: sum(w) > 1e-3),
    st.integers(0, 2**31),
)
def test_an_epoch_has_each_example_its_share_of_times(weights, seed):
    order = Order(len(weights), np.array(weights))
    copies = np.array(weights) / np.mean(weights)
    for epoch in (0, 3):
        found = counts(order, epoch, seed)
        assert found.sum() == len(weights)
        assert (found >= np.floor(copies - 1e-6)).all()
        assert (found <= np.ceil(copies + 1e-6)).all()
        assert not found[np.array(weights) == 0].any()


def test_over_epochs_the_counts_are_proportional_to_the_weights():
    weights = np.array([0.0, 0.5, 1.0, 2.5, 1.0])
    order = Order(5, weights)
    total = sum(counts(order, epoch) for epoch in range(400))
    np.testing.assert_allclose(total / 400, weights, atol=0.08)
    drawn = [order.draw(u) for u in (np.arange(1000) + 0.5) / 1000]
    np.testing.assert_allclose(np.bincount(drawn, minlength=5) / 200, weights, atol=0.01)


def test_equal_weights_are_one_of_each_in_an_epoch_and_positions_are_independent():
    order = Order(1000, np.full(1000, 0.3))
    assert (counts(order, 2) == 1).all()
    weighted = Order(1000, np.arange(1000.0))
    positions = np.array([2500, 17, 999, 17, 1000])
    one_by_one = [weighted.places(5, np.array([p]))[0] for p in positions]
    assert weighted.places(5, positions).tolist() == one_by_one
    assert one_by_one[1] == one_by_one[3]


# ------------------------------------------------------------------------------- a table of scores


def table(folder: Path, scores: list) -> str:
    folder.mkdir(exist_ok=True)
    rows = []
    for i, score in enumerate(scores):
        Image.new("RGB", (8, 8), (i * 9 % 256, 40, 80)).save(folder / f"{i}.png")
        row = {"image": f"{i}.png", "caption": f"picture {i}"}
        rows.append(row if score == "absent" else row | {"score": score})
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))


def batches_of(source: str, batch_size: int = 4, **fields) -> TrainIterator:
    count, index = fields.pop("processes", 1), fields.pop("process", 0)
    fields = {"weight_column": "score", "augment": {"crop": None}} | fields
    config = DataConfig(source=source, eval_split=None, **fields)
    return train_batches(
        config,
        Preprocess(PreprocessConfig(image_size=8)),
        train_bpe(["picture 0 1 2 3 4 5 6 7 8 9"], 270, 16),
        batch_size=batch_size,
        seed=1,
        process_index=index,
        process_count=count,
    )


def reds(batch: dict) -> list[int]:
    """The number of each example, from its colour."""
    return [int(image[0, 0, 0]) // 9 for image in batch["images"]]


def test_batches_follow_the_weights_and_resume_exactly(tmp_path):
    source = table(tmp_path / "data", [0, 1, 1, 2, 0.5, 1.5, 3, 0, 1, 0, 1, 1])
    batches = batches_of(source)
    assert "weighted by score; an epoch of 12 samples has" in batches.description
    found = [reds(next(batches)) for _ in range(6)]
    epoch = collections.Counter(n for batch in found[:3] for n in batch)
    assert epoch[6] == 3
    assert epoch[3] == 2
    assert not {0, 7, 9} & epoch.keys()
    again = batches_of(source)
    first = batches_of(source)
    for _ in range(2):
        next(first)
    again.set_state(json.loads(json.dumps(first.get_state())))
    assert [reds(next(again)) for _ in range(4)] == found[2:]
    halves = [batches_of(source, 2, process=i, processes=2) for i in range(2)]
    both = [[n for half in halves for n in reds(next(half))] for _ in range(6)]
    assert both == found
    changed = table(tmp_path / "data", [0, 1, 1, 2, 0.5, 1.5, 3, 0, 1, 0, 1, 9])
    with pytest.raises(DataError, match="for other weights of the examples"):
        batches_of(changed).set_state(first.get_state())
    for iterator in (batches, again, first, *halves):
        iterator.close()


def test_a_new_column_begins_a_new_pass(tmp_path):
    source = table(tmp_path / "data", [1, 2, 1, 0, 1, 1, 1, 1])
    plain = batches_of(source, weight_column=None)
    next(plain)
    weighted = batches_of(source)
    weighted.resume(json.loads(json.dumps(plain.get_state())))
    assert weighted.position_change == (
        "starts a new pass at step 1 (changed: --data.weight-column)"
    )
    assert 3 not in reds(next(weighted)) + reds(next(weighted))
    plain.close()
    weighted.close()


def test_a_broken_image_is_replaced_by_weight(tmp_path):
    source = table(tmp_path / "data", [0, 0, 0, 1, 1, 0])
    (tmp_path / "data" / "3.png").write_bytes(b"broken")
    batches = batches_of(source)
    assert {n for _ in range(6) for n in reds(next(batches))} == {4}
    batches.close()


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (-1, r"row 3 .*has -1 in the column 'score'"),
        (float("nan"), r"has nan in the column"),
        (float("inf"), r"has inf in the column"),
        (None, r"has no value in the column 'score'"),
        ("absent", r"has no value in the column 'score', which data\.weight_column names: give a"),
        ("good", r"has 'good' in the column"),
        (True, r"has True in the column"),
    ],
)
def test_a_wrong_weight_is_named_with_its_place(tmp_path, score, message):
    source = table(tmp_path / "data", [1, 2, score, 1])
    with pytest.raises(DataError, match=message):
        batches_of(source)
    if score is not True:
        kept = [FieldFilter("score", at_least=0, at_most=9)]
        batches_of(source, 2, filters=kept).close()


def test_weights_need_a_column_a_positive_one_and_random_access(tmp_path):
    source = table(tmp_path / "data", [0, 0, 0, 0])
    with pytest.raises(DataError, match=r"has no weight above 0 in 4 examples"):
        batches_of(source)
    with pytest.raises(DataError, match=r"no feature 'scores' that data\.weight_column names"):
        batches_of(source, weight_column="scores")
    (tmp_path / "tars").mkdir()
    tars = kinds.tars(tmp_path / "tars")
    stream = r"'score' needs random access, and .* is read as a stream: set data.access=.random"
    with pytest.raises(ConfigError, match=stream):
        batches_of(tars, access="stream")
    part = MixturePart(tars, access="stream", weight_column="score")
    with pytest.raises(ConfigError, match=stream):
        batches_of("", weight_column=None, mixture=(part,))


def test_evaluation_needs_no_weights(tmp_path):
    source = table(tmp_path / "data", [1.0, "absent"])
    rows = [json.loads(row) for row in Path(source).read_text().splitlines()]
    splits = [row | {"split": split} for row, split in zip(rows, ("train", "test"), strict=True)]
    Path(source).write_text("\n".join(map(json.dumps, splits)))
    config = DataConfig(source=source, weight_column="score")
    assert len(open_source(config, "test")) == len(open_source(config, "train")) == 1


# ------------------------------------------------------------------------------------- mixtures


def mixture(temperature: float | None, *parts: MixturePart):
    config = DataConfig(mixture=parts, mixture_temperature=temperature, eval_split=None)
    return open_stream(config, 4, seed=0, process_index=0, process_count=1)


def test_a_temperature_weights_parts_by_their_sizes(tmp_path):
    small, large = table(tmp_path / "a", [1] * 4), table(tmp_path / "b", [1] * 16)
    parts = MixturePart(small), MixturePart(large)
    shares = {t: mixture(t, *parts).shares.tolist() for t in (1.0, 2.0, 1e9, None)}
    assert shares[1.0] == pytest.approx([0.2, 0.8])
    assert shares[2.0] == pytest.approx([1 / 3, 2 / 3])  # the square roots are 2 and 4
    assert shares[1e9] == pytest.approx([0.5, 0.5])
    assert shares[None] == [0.5, 0.5]
    assert "b/pairs.jsonl 66.7%" in mixture(2.0, *parts).description


def test_a_temperature_needs_sizes_and_no_weights(tmp_path):
    (tmp_path / "tars").mkdir()
    stream = MixturePart(kinds.tars(tmp_path / "tars"), access="stream")
    small = MixturePart(table(tmp_path / "a", [1] * 4))
    with pytest.raises(ConfigError, match=r"unknown length: set examples=N, or give weights inst"):
        mixture(2.0, small, stream)
    known = dataclasses.replace(stream, examples=400)
    assert mixture(2.0, small, known).shares.tolist() == pytest.approx([2 / 22, 20 / 22])
    with pytest.raises(ConfigError, match=r"weight is 2\.0 and has no effect: data\.mixture_temp"):
        mixture(2.0, small, dataclasses.replace(known, weight=2.0))
    with pytest.raises(ConfigError, match=r"mixture_temperature is 2\.0 and has no effect"):
        DataConfig(source="a.csv", mixture_temperature=2.0)
    with pytest.raises(ConfigError, match=r"mixture_temperature is 0\.0: choose a number above 0"):
        mixture(0.0, small)


def test_a_weighted_part_of_a_mixture_follows_its_weights(tmp_path):
    source = table(tmp_path / "a", [0, 1, 3, 0])
    part = MixturePart(source, weight_column="score")
    batches = batches_of("", weight_column=None, mixture=(part,))
    found = collections.Counter(n for _ in range(2) for n in reds(next(batches)))
    assert found == {1: 2, 2: 6}
    state = json.loads(json.dumps(batches.get_state()))
    table(tmp_path / "a", [0, 2, 2, 0])
    with pytest.raises(DataError, match="weighted"):
        batches_of("", weight_column=None, mixture=(part,)).set_state(state)
    batches.close()


# ------------------------------------------------------------------------------------- data show


def test_show_prints_the_effect_of_weights_and_shares(tmp_path, capsys):
    source = table(tmp_path / "a", [0, 1, 3, 0])
    command.show(source, weight_column="score", batch_size=4)
    out = capsys.readouterr().out
    assert (
        "an epoch of 4 samples has 2 distinct examples: each at most 3 times, 2 never; the tenth "
        "with the largest weights is 75% of the samples" in out
    )
    config = tmp_path / "mixed.py"
    config.write_text(
        "import vlm\nfrom vlm.config import MixturePart\n"
        f"parts = MixturePart({source!r}), MixturePart({table(tmp_path / 'b', [1] * 16)!r})\n"
        "config = vlm.Experiment(data=vlm.DataConfig(mixture=parts, mixture_temperature=2.0))\n"
    )
    command.show(str(config), batch_size=4)
    assert " 66.7% of the samples  16 examples  " in capsys.readouterr().out
    command.show(str(config), batch_size=4, json=True)
    assert json.loads(capsys.readouterr().out)[0]["examples"] == 4


def test_the_order_of_plain_data_has_no_weights(tmp_path):
    config = DataConfig(source=table(tmp_path / "a", [1, 2]))
    order = order_of(open_source(config, "train"), config)
    assert (order.weights, order.digest, order.description()) == (None, "", "")
