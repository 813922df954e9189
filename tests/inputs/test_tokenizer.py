import dataclasses
import pickle

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.config import TokenizerConfig
from vlm.errors import ConfigError, DataError
from vlm.inputs.tokenizer import Tokenizer, train_bpe

TEXTS = ["woman running", "man running: dark skin tone", "flag: Åland", "走る女", "a dog, a cat"]
TOKENIZER = train_bpe(TEXTS, 300, 12)


def with_rules(**changes) -> Tokenizer:
    return Tokenizer(TOKENIZER._vocabulary, dataclasses.replace(TOKENIZER.config, **changes))


@given(st.lists(st.text(max_size=40), max_size=5))
@settings(max_examples=50, deadline=None)
def test_rows_end_with_eos_then_pad_and_decode_to_their_text(texts):
    tokens = TOKENIZER(texts)
    assert tokens.shape == (len(texts), 12)
    assert tokens.dtype == np.int32
    assert tokens.min(initial=0) >= 0
    assert tokens.max(initial=0) < TOKENIZER.vocab_size
    for text, row, back in zip(texts, tokens, TOKENIZER.decode(tokens), strict=True):
        (ends,) = np.nonzero(row == 1)
        assert len(ends) == 1  # the first eos is the only one, whatever the text contains
        assert (row[ends[0] + 1 :] == 0).all()
        if not TOKENIZER.count_truncated(text):
            assert back == text.strip()


def test_one_string_is_a_list_of_one():
    np.testing.assert_array_equal(TOKENIZER("a dog"), TOKENIZER(["a dog"]))
    assert TOKENIZER([]).shape == (0, 12)


def test_truncation_keeps_eos_or_not():
    long = "dog " * 50
    assert TOKENIZER(long)[0, -1] == 1
    assert with_rules(keep_eos=False)(long)[0, -1] != 1
    np.testing.assert_array_equal(with_rules(keep_eos=False)(long)[0, :-1], TOKENIZER(long)[0, :-1])
    assert TOKENIZER.count_truncated([long, "a dog", long]) == 2


def test_left_truncation_keeps_the_end():
    long = "dog " * 50 + "a cat"
    left = with_rules(truncation_side="left")
    ids = TOKENIZER.vocabulary.encode(long, add_special_tokens=False).ids
    assert left(long)[0].tolist() == [*ids[-11:], 1]
    assert with_rules(truncation_side="left", keep_eos=False)(long)[0].tolist() == [*ids[-11:], 1]
    started = with_rules(truncation_side="left", bos_id=5)
    assert started(long)[0].tolist() == [5, *ids[-10:], 1]
    assert with_rules(truncation_side="left", eos_id=None)(long)[0].tolist() == ids[-12:]
    np.testing.assert_array_equal(left("a dog"), TOKENIZER("a dog"))
    alone = with_rules(truncation_side="left", context_length=2, bos_id=None)
    assert alone(long)[0].tolist() == [ids[-1], 1]


def test_prompts_come_before_cleaning_and_are_named():
    prompts = {"query": "A Dog: ", "empty": ""}
    tokenizer = with_rules(prompts=prompts, lowercase=True, default_prompt="query")
    plain = with_rules(lowercase=True)
    np.testing.assert_array_equal(tokenizer("x"), plain("a dog: x"))
    np.testing.assert_array_equal(tokenizer("x", "empty"), plain("x"))
    np.testing.assert_array_equal(tokenizer("x", ""), plain("x"))
    assert tokenizer.lengths("x") == plain.lengths("a dog: x")
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(tokenizer))("x"), tokenizer("x"))
    with pytest.raises(ConfigError, match="prompt 'passage' is unknown: it has 'query', 'empty'"):
        tokenizer("x", "passage")
    with pytest.raises(ConfigError, match="prompt 'passage' is unknown: the model has no prompts"):
        with_rules(default_prompt="passage")


def test_the_longest_text_that_fits_is_not_truncated():
    ids = TOKENIZER("x" * 5)[0]
    used = int(np.flatnonzero(ids == 1)[0]) + 1
    exact, short = with_rules(context_length=used), with_rules(context_length=used - 1)
    assert exact.count_truncated("x" * 5) == 0
    assert short.count_truncated("x" * 5) == 1
    assert exact(["x" * 5])[0, -1] == short(["x" * 5])[0, -1] == 1


def test_bos_and_left_padding():
    plain = TOKENIZER("a dog")[0]
    body = plain[: int(np.flatnonzero(plain == 1)[0])]
    row = with_rules(bos_id=5, pad_side="left")("a dog")[0]
    expected = [5, *body, 1]
    np.testing.assert_array_equal(row, [0] * (12 - len(expected)) + expected)
    assert with_rules(bos_id=5, pad_side="left").decode([row]) == ["a dog"]


def test_pad_may_be_the_end_token():
    siglip = with_rules(pad_id=1)
    assert set(siglip("a dog")[0, -5:]) == {1}
    assert siglip.decode(siglip(["a dog"])) == ["a dog"]
    left = with_rules(pad_id=1, pad_side="left")
    assert left.decode(left(["a dog"])) == ["a dog"]


def test_a_special_token_in_a_text_is_text_unless_asked():
    assert list(TOKENIZER("<eos>")[0]).count(1) == 1
    assert list(with_rules(parse_special=True)("<eos>")[0]).count(1) == 2


def test_lowercase():
    lower = with_rules(lowercase=True)
    np.testing.assert_array_equal(lower("A DOG"), TOKENIZER("a dog"))


def test_training_is_deterministic_and_ignores_order():
    again = train_bpe(TEXTS[::-1], 300, 12)
    assert again._vocabulary.to_str() == TOKENIZER._vocabulary.to_str()
    assert TOKENIZER._vocabulary.id_to_token(0) == "<pad>"
    assert TOKENIZER._vocabulary.id_to_token(1) == "<eos>"
    assert TOKENIZER.vocab_size == 300


def test_save_load_and_pickle_keep_everything(tmp_path):
    tokenizer = with_rules(lowercase=True, pad_side="left", context_length=9)
    tokenizer.save(tmp_path / "new" / "folder")
    loaded = Tokenizer.load(tmp_path / "new" / "folder")
    for copy in (loaded, pickle.loads(pickle.dumps(tokenizer))):
        assert copy.config == tokenizer.config
        np.testing.assert_array_equal(copy([*TEXTS, "<eos> 🙂"]), tokenizer([*TEXTS, "<eos> 🙂"]))


def test_settings_inside_a_tokenizer_json_do_not_count(tmp_path):
    vocabulary = tokenizers.Tokenizer.from_str(TOKENIZER._vocabulary.to_str())
    vocabulary.enable_truncation(3)
    vocabulary.enable_padding(pad_id=7, length=6)
    vocabulary.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.from_file(tmp_path / "tokenizer.json", TOKENIZER.config)
    np.testing.assert_array_equal(loaded(TEXTS), TOKENIZER(TEXTS))


@pytest.mark.untyped
def test_bad_input(tmp_path):
    with pytest.raises(DataError, match=r"text 1 is 3"):
        TOKENIZER(["a", 3])
    with pytest.raises(ConfigError, match=r"clean is 'clap': choose one of 'none'"):
        with_rules(clean="clap")
    with pytest.raises(ConfigError, match=r"eos_id is 300.*300 tokens"):
        with_rules(eos_id=300)
    with pytest.raises(ConfigError, match="context_length 1 "):
        with_rules(context_length=1)
    with pytest.raises(ConfigError, match=r"vocab_size 100.*at least 258"):
        train_bpe(TEXTS, 100, 12)
    with pytest.raises(DataError, match="no texts"):
        train_bpe([], 300, 12)
    with pytest.raises(DataError, match=r"nowhere/vlm_tokenizer\.json"):
        Tokenizer.load(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"is not a tokenizer\.json"):
        Tokenizer.from_file(tmp_path / "tokenizer.json", TokenizerConfig())
    (tmp_path / "vlm_tokenizer.json").write_text('{"context": 3}')
    with pytest.raises(DataError, match="no field 'context'"):
        Tokenizer.load(tmp_path)
