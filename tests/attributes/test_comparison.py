import re
import time
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from afmrl_jax.attributes.agreement import agreement
from afmrl_jax.attributes.bm25 import attribute_terms
from afmrl_jax.attributes.comparison import fold, is_empty, words
from afmrl_jax.attributes.text import normalise

SAME = [
    ("café", unicodedata.normalize("NFD", "café")),
    ("４０ ｃｍ", "40 cm"),
    ("٤٠٫٥", "40.5"),  # Arabic-Indic digits
    ("४० सेमी", "40 सेमी"),
    ("navy\u200b blue\ufeff", "navy blue"),
    ("na\u00advy", "navy"),  # a soft hyphen
    ("\u202bnavy\u202c", "navy"),
    ("KIRMIZI", "kırmızı"),
    ("İPEK", "ipek"),
    ("STRASSE", "straße"),
    ("ΛΟΓΟΣ", "λόγος".replace("ό", "ο")),
    ("كــتاب", "كتاب"),
    ("می\u200cخواهم", "میخواهم"),
    ("क्\u200dष", "क्ष"),
    ("ﬁne ㎏", "fine kg"),
    ("10×20 – men’s", "10x20 - men's"),
    ("5½", "5 1/2"),
    ("a\0b\tc", "a b c"),
    ("CoolTech™, Lycra®", "cooltech, lycra"),
]


@pytest.mark.parametrize("value, other", SAME)
def test_one_value_in_two_writings_is_one_for_bm25_for_f1_and_as_a_name(value, other):
    assert attribute_terms({"x": value}) == attribute_terms({"x": other})
    assert agreement([{"x": value}], [{"x": other}])["f1"] == 1
    assert list(normalise({value: "first", other: "second"}).values()) == ["first"]


@pytest.mark.parametrize("value, other", [("5½", "51/2"), ("10²", "102"), ("café", "cafe")])
def test_values_that_differ_stay_two(value, other):
    assert fold(value) != fold(other)


@given(st.text(st.characters()))
@example("i\u0307\u0301")
def test_folding_twice_changes_nothing_and_what_is_equal_when_printed_is_equal_folded(text):
    folded = fold(text)
    assert fold(folded) == folded == " ".join(folded.split())
    assert is_empty(text) == is_empty(folded)
    for printed in normalise({"x": text}).values():
        assert fold(printed) == folded
    "".join(words(folded)).encode()


def test_words_keep_their_marks_and_unspaced_writings_give_pairs_of_letters():
    assert words(fold("नीला रंग")) == ["नीला", "रंग"]
    assert words(fold("深蓝色")) == ["深蓝", "蓝色"]
    assert words(fold("纯棉T恤 100%")) == ["纯棉", "t", "恤", "100"]
    assert words(fold("ブルー")) == ["ブル", "ルー"]
    assert words(fold("남색 원피스 1.5")) == ["남색", "원피스", "1.5"]
    blue, red = (set(words(fold(color))) for color in ("สีน้ำเงิน", "สีแดง"))
    assert blue and red and not blue & red
    assert all(unicodedata.category(word[0])[0] == "L" for word in blue | red)


EMPTY = """unknown|Unknown.|N/A|n.a.|(not specified)|-|—|?|…|none given|NULL|nan|Does Not Apply
keine Angabe|k. A.|不明|未知|inconnu|Desconocido|нет данных|알 수 없음|ไม่ระบุ|غير محدد|अज्ञात|\u200b
not visible in the photo|cannot be determined from the provided image|No information available
unknown (no label is seen)|No visible brand|Brand not specified|unknown brand
it is not clearly visible"""


@pytest.mark.parametrize("value", re.split(r"[|\n]", EMPTY))
def test_a_value_that_says_nothing_is_no_attribute_anywhere(value):
    attributes = {"color": "navy", "brand": value}
    assert attribute_terms(attributes) == ["color=navy", "navy"]
    assert normalise(attributes) == {"color": "navy"}
    assert agreement([{"brand": value}], [{"brand": value}])["f1"] == 0


@pytest.mark.parametrize(
    "value",
    ["none", "No", "ND", "0", "$$", "A+", "Unknown Pleasures", "brand new", "size 0", "color"],
)
def test_a_value_that_says_little_is_one(value):
    assert not is_empty(value)


@pytest.mark.parametrize("unit", ["\u0315\u0300", "e\u0344", "not ", "-", "า", "深", "1."])
def test_hostile_values_take_time_in_proportion_to_their_length(unit):
    start = time.process_time()
    is_empty(unit * 50_000)
    words(fold(unit * 50_000))
    assert time.process_time() - start < 10
