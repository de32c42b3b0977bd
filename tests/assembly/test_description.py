"""Tokens' probabilities laid over the pairs that they write."""

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from afmrl_jax.assembly.description import Description, describe, pairs_of_tokens, token_starts
from afmrl_jax.assembly.generator import Answer
from afmrl_jax.attributes.text import Parsed, Verdict, parse
from afmrl_jax.data.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["color: red; type: café; a:;b;c 猫 " * 9], 320)
IDS = st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 1), max_size=30)
PIECES = st.sampled_from([";", ":", "; ", "\n", " ", "a", "color", "\\", "é", "猫", "\u0301", "A"])


def answer_of(ids, log_probs=None, closed=True):
    text = TOKENIZER.decode(ids, skip_special_tokens=False)
    log_probs = -np.ones(len(ids)) if log_probs is None else np.array(log_probs)
    return Answer(text, closed, np.array(ids, np.int32), log_probs.astype(np.float32))


def encode(*parts):
    return [i for part in parts for i in TOKENIZER.encode(part, add_special_tokens=False).ids]


@given(IDS | st.lists(PIECES).map(lambda parts: encode(*parts)), st.booleans())
@example(encode("a: 猫")[:-1], True)  # cut inside a letter
@example([0, 255, TOKENIZER.token_to_id("<|im_start|>")], True)
def test_each_attribute_that_is_read_has_a_confidence(ids, closed):
    answer = answer_of(ids, closed=closed)
    one = describe(answer, TOKENIZER)
    assert one.parsed == parse(answer.text, closed)
    assert list(one.confidence) == list(one.parsed.attributes)
    # Each token's log-prob is -1, and counts once at most.
    counted = [-math.log(p) for p in one.confidence.values()]
    assert counted == pytest.approx([round(n) for n in counted]) and sum(counted) <= len(ids) + 0.1


@given(IDS)
@example([TOKENIZER.token_to_id(letter) for letter in "çĪa«"])  # broken UTF-8 between good letters
def test_a_token_stands_where_decoding_puts_it(ids):
    text = TOKENIZER.decode(ids, skip_special_tokens=False)
    starts = token_starts(TOKENIZER, np.array(ids, np.int64))
    assert starts == sorted(starts) and all(start < len(text) for start in starts)
    for token, start in zip(ids, starts):
        alone = TOKENIZER.decode([token], skip_special_tokens=False)
        if "\ufffd" not in alone:  # begins and ends with a whole letter
            assert text[start : start + len(alone)] == alone


def test_confidence_is_the_product_over_a_value_s_tokens():
    """Worked by hand: .8 for the colour, .5 x .5 for the type; names and separators are of none."""
    shares = [("Ġcolor", 0.5), (":", 1), ("Ġ", 1), ("r", 0.8), ("e", 1), ("d", 1), (";", 0.1)]
    shares += [("Ġtype", 0.5), (":", 1), ("f", 1), ("Ã", 0.5), ("©", 0.5), (";", 0.1)]
    ids = [TOKENIZER.token_to_id(name) for name, _ in shares]
    one = describe(answer_of(ids, [math.log(share) for _, share in shares]), TOKENIZER)
    assert one.answer.text == " color: red; type:fé;"
    assert one.confidence == pytest.approx({"color": 0.8, "type": 0.25})


def test_a_separator_and_the_name_behind_it_count_for_no_value():
    tokenizer = train_tokenizer(["a:b;c:d a;c " * 99], 300)
    names = {name: tokenizer.token_to_id(name) for name in ("a", ":", "b", ";c", "d")}
    assert None not in names.values()
    ids = [names[name] for name in ("a", ":", "b", ";c", ":", "d")]
    log_probs = np.log(np.array([0.5, 1, 0.7, 0.25, 1, 0.6], np.float32))
    answer = Answer(tokenizer.decode(ids), True, np.array(ids), log_probs)
    assert describe(answer, tokenizer).confidence == pytest.approx({"a": 0.7, "c": 0.6})


def test_only_a_valid_answer_is_sure_of_anything():
    attributes = {"color": "red", "size": "40"}
    for verdict, sure in ((Verdict.VALID, {"color": "red"}), (Verdict.UNCLOSED, {})):
        parsed = Parsed(attributes, verdict)
        assert Description(answer_of([]), parsed, {"color": 0.9, "size": 0.5}).sure(0.9) == sure


def test_the_tokens_of_a_pair_are_those_of_its_name_its_colon_and_its_value():
    parts = [("color:", "color"), (" red", "color"), (";", None), ("\n", None), (" type", "type")]
    parts += [(": 猫", "type"), (";", None), (" brand: unknown", None)]  # which says nothing
    ids = [encode(text) for text, _ in parts]
    expected = [name for part, (_, name) in zip(ids, parts) for _ in part]
    answer = answer_of([i for part in ids for i in part])
    assert answer.text == "color: red;\n type: 猫; brand: unknown"
    assert pairs_of_tokens(answer, TOKENIZER) == expected
    assert set(pairs_of_tokens(answer_of(encode("red; mug")), TOKENIZER)) == {None}
    cut = answer_of(encode("color: red; type: mu"), closed=False)
    assert set(pairs_of_tokens(cut, TOKENIZER)) == {"color", None}  # the last one is not trusted


@given(IDS | st.lists(PIECES).map(lambda parts: encode(*parts)), st.booleans())
def test_a_value_s_tokens_are_among_its_pair_s(ids, closed):
    answer = answer_of(ids, closed=closed)
    names = pairs_of_tokens(answer, TOKENIZER)
    assert len(names) == len(ids)
    assert {name for name in names if name} <= set(parse(answer.text, closed).attributes)
