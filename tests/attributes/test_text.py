import json
import time
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from afmrl_jax.attributes.comparison import MAX_MARKS
from afmrl_jax.attributes.text import Parsed, Verdict, format_attributes, normalise, parse

PIECES = ["\\", ";", ":", " ", "\n", "\r", "a", "B", "\u0301", "\u037e", "\0"]
PIECES = st.sampled_from([*PIECES, "{", '"', "-", "*", "1.", "_", "\u200b", "unknown"])
TEXTS = st.text(st.characters()) | st.lists(PIECES).map("".join)
MAPPINGS = st.dictionaries(TEXTS, TEXTS, max_size=8)
ENDLESS = {"max_characters": 10**9, "max_pairs": 10**9}


@given(MAPPINGS)
@example({"a\\": "\\", "b;": ";", ":c:": ":", "\\;": "\\:"})
@example({"\u212a": "\u0344" * 40, "k": "second of one name", "e": "\u0301\ud800"})
def test_what_is_printed_reads_back_as_it_was(attributes):
    parsed = parse(format_attributes(attributes), **ENDLESS)
    normal = normalise(attributes)
    assert parsed == Parsed(normal, Verdict.VALID if normal else Verdict.EMPTY)
    assert list(parsed.attributes) == list(normal)  # in the same order


@given(MAPPINGS)
def test_normalising_twice_changes_nothing(attributes):
    once = normalise(attributes)
    assert normalise(once) == once
    for text in [*once, *once.values()]:
        assert text == unicodedata.normalize("NFC", text) == " ".join(text.split())
        text.encode()  # no half characters


@given(TEXTS, st.booleans(), st.integers(0, 50), st.integers(0, 5))
def test_any_text_is_read_without_an_error_into_normal_attributes(text, closed, length, pairs):
    for limits in ({}, {"max_characters": length, "max_pairs": pairs}):
        parsed = parse(text, closed, **limits)
        assert normalise(parsed.attributes) == parsed.attributes
        assert closed or parsed.verdict is Verdict.UNCLOSED


@given(MAPPINGS)
def test_printed_text_is_one_line_of_characters_that_a_file_can_hold(attributes):
    text = format_attributes(attributes)
    assert text == "".join(text.splitlines())
    assert json.loads(json.dumps(text).encode()) == text
    text.encode()


def test_plain_attributes_are_printed_as_they_stand():
    plain = {"color": "navy blue", "ratio": "16:9", "volume": "1,5 l (50 %)"}
    assert format_attributes(plain) == "color: navy blue; ratio: 16:9; volume: 1,5 l (50 %)"
    assert format_attributes({}) == ""


def test_separators_inside_names_and_values_are_escaped():
    text = format_attributes({"size: EU": "40; 41", "path": "a\\b"})
    assert text == r"size\: eu: 40\; 41; path: a\\b"
    assert parse(text).attributes == {"size: eu": "40; 41", "path": "a\\b"}


def test_normal_names_are_lower_case_and_blanks_collapse_and_the_first_of_equal_names_stays():
    raw = {" Frame\tColor ": "  Navy\u00a0\r\nBlue\0", "frame color": "red", "": "x", "size": " "}
    assert normalise(raw) == {"frame color": "Navy Blue"}
    assert normalise({"a": "e\u0301 \ud83d"}) == {"a": "\u00e9 \ufffd"}


@pytest.mark.parametrize(
    "text, attributes, verdict",
    [
        ("color: red; size: 40", {"color": "red", "size": "40"}, Verdict.VALID),
        ("\nColor :red\nSize: 40 ;\n", {"color": "red", "size": "40"}, Verdict.VALID),
        ("url: http://x", {"url": "http://x"}, Verdict.VALID),
        ("", {}, Verdict.EMPTY),
        (" ;\n;", {}, Verdict.EMPTY),
        ("a red shirt", {}, Verdict.MALFORMED),
        ("color: red; size", {"color": "red"}, Verdict.MALFORMED),
        ("color: ; size: 40", {"size": "40"}, Verdict.MALFORMED),
        (": red; size: 40", {"size": "40"}, Verdict.MALFORMED),
        (r"color\: red", {}, Verdict.MALFORMED),
        ("color: red; COLOR: blue", {"color": "red"}, Verdict.DUPLICATE),
        ("color: red; color: blue; size", {"color": "red"}, Verdict.MALFORMED),
        ("a: 1; b: 2; c: 3; d: 4", {"a": "1", "b": "2", "c": "3"}, Verdict.TOO_LONG),
        ("a: 1; color: a very long value it is", {"a": "1"}, Verdict.TOO_LONG),
    ],
)
def test_each_fault_has_its_verdict_and_keeps_what_could_be_read(text, attributes, verdict):
    assert parse(text, max_characters=30, max_pairs=3) == Parsed(attributes, verdict)


@pytest.mark.parametrize(
    "text",
    ['{"color": "navy", "sleeve": "long"}', '"color": "navy"', "- **Color:** navy",
     "1. color: navy", "**color**: navy", "| color: navy |", "<think>the color: navy"],
)  # fmt: skip
def test_an_answer_in_another_format_than_the_taught_one_is_not_valid(text):
    """A generator would be rewarded for names like {"color"."""
    assert parse(text) == Parsed({}, Verdict.MALFORMED)
    odd = {text.partition(":")[0]: "navy"}  # as a name it is printed so that it can be told apart
    assert parse(format_attributes(odd)) == Parsed(normalise(odd), Verdict.VALID)


def test_values_that_say_nothing_are_no_attributes_and_alone_no_valid_answer():
    parsed = parse("color: navy; brand: unknown; brand: x; size: -")
    assert parsed == Parsed({"color": "navy", "brand": "x"}, Verdict.VALID)
    assert parse("color: unknown; size: n/a") == Parsed({}, Verdict.EMPTY)
    assert format_attributes({"color": "not visible", "size": "40"}) == "size: 40"


@pytest.mark.parametrize("text", ["color: red; size: 4", "color: red; size", "color: red; si: 4; "])
def test_the_last_pair_of_an_answer_cut_by_the_token_limit_is_not_trusted(text):
    assert parse(text, closed=False) == Parsed({"color": "red"}, Verdict.UNCLOSED)


@pytest.mark.parametrize("unit", ["\u0315\u0300", "\\", "\\;", ":", ";", "a: b;", "a\n", "e\u0344"])
def test_hostile_text_takes_time_in_proportion_to_its_length(unit):
    """50,000 units take half a second at most; squared they would take many minutes."""
    start = time.process_time()
    parse(unit * 50_000, **ENDLESS)
    normalise({unit * 50_000: unit * 50_000})
    assert time.process_time() - start < 10


def test_no_letter_keeps_more_marks_than_any_writing_has():
    assert normalise({"a": "x" + "\u0315" * 99}) == {"a": "x" + "\u0315" * MAX_MARKS}
