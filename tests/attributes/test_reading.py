"""Answers as models of several families write them, and what is no answer."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afmrl_jax.attributes.reading import FORMS, read_answer
from afmrl_jax.attributes.text import Verdict, format_attributes, normalise, parse

NAVY = {"color": "navy", "sleeve": "long"}
ANSWERS = [  # each says NAVY
    ("plain", "color: navy; sleeve: long"),
    ("plain", "Color: navy\nSleeve: long.\n"),
    ("plain", "color: navy; sleeve: long; brand: unknown; size: not visible in the photo"),
    ("plain", '"color": "navy"; "sleeve": "long"'),
    ("plain", "color: “navy”,\nsleeve: “long”,"),
    ("plain", "Sure, here you go: color: navy; sleeve: long"),
    ("plain", "Here are the attributes:\ncolor: navy; sleeve: long"),
    ("plain", "color: navy; sleeve: long\n\nNote: the brand can't be told from this one photo."),
    ("plain", "<think>The color: navy or black; hm.</think>\n\ncolor: navy; sleeve: long"),  # Qwen3
    ("plain", "It is a dress: navy.\n</think>\ncolor: navy; sleeve: long"),  # R1's template
    ("plain", "<think>hm</think><answer>color: navy; sleeve: long</answer>"),
    ("plain", "<|channel|>analysis<|message|>hm: so<|end|><|start|>assistant"
     "<|channel|>final<|message|>color: navy; sleeve: long<|return|>"),  # gpt-oss
    ("plain", "```\ncolor: navy; sleeve: long\n```"),
    ("plain", "color：navy；sleeve：long。"),  # InternVL
    ("commas", "color: navy, sleeve: long"),
    ("commas", "Color: navy. Sleeve: long."),
    ("commas", "color: navy | sleeve: long"),
    ("list", "- **Color:** navy\n- **Sleeve:** long"),  # Gemma
    ("list", "Here are the key attributes:\n\n1. **Color**: navy\n2. **Sleeve**: long\n\n"
     "Let me know if you need more!"),  # Llama
    ("list", "### Attributes\n* Color: navy\n* Sleeve: long"),
    ("list", "•Color: navy\n•Sleeve: long"),
    ("list", "**color**: navy; `sleeve`: *long*"),
    ("list", "- Color:\n  - navy\n- Sleeve:\n  - long"),
    ("table", "| Attribute | Value |\n|---|:--|\n| Color | navy |\n| **Sleeve** | long |"),
    ("table", "Color | Sleeve\n--- | ---\nnavy | long"),
    ("json", '{"color": "navy", "sleeve": "long"}'),
    ("json", 'Here it is:\n```json\n{\n  "color": "navy",\n  "sleeve": "long"\n}\n```\nNote: x.'),
    ("json", '{"attributes": {"color": "navy", "sleeve": ["long"], "brand": null}, "title": "x"}'),
    ("json", '[{"name": "color", "value": "navy"}, {"name": "sleeve", "value": "long"}]'),
    ("json", '{"attributes": [{"color": "navy"}, {"sleeve": "long"}]}'),
    ("json", '{"color": {"value": "navy", "confidence": 0.9}, "sleeve": {"value": "long"}}'),
    ("json", "{'color': 'navy', 'sleeve': 'long',}"),
    ("json", '{"color": "navy"}\n{"sleeve": "long"}'),
    ("json", '["color: navy", "sleeve: long"]'),
    ("plain", "🔹 color: navy\n✅ sleeve: long\n\n✨ Hope this helps!"),
    ("list", "以下が商品の属性です。\n・color：navy\n・sleeve：long"),
    ("list", "- **Look**\n  - Color: navy\n- **Cut**\n  - Sleeve: long"),
    ("list", "- color: navy; - sleeve: long"),
    ("commas", "根据图片，该商品的属性如下：color：navy；sleeve：long"),
    ("plain", "Extracted attributes: color: navy; sleeve: long"),
    ("plain", "color: navy؛ sleeve: long"),  # Arabic
    ("commas", "color: navy، sleeve: long"),
    ("plain", "color: navy\nsleeve: long\n(Word count: 4)"),
    ("json", '{"attributes": "color: navy; sleeve: long"}'),
    ("plain", "color: [navy]; sleeve: long"),
    ("commas", "Color: navy - Sleeve: long"),
    ("list", "1) color: navy 2) sleeve: long"),
    ("commas", "color: navy\tsleeve: long"),
    ("plain", "Claro, aquí tienes: color: navy; sleeve: long"),
]  # fmt: skip


@pytest.mark.parametrize("form, answer", ANSWERS)
def test_what_a_model_says_is_read_in_whatever_form_it_says_it(form, answer):
    read = read_answer(answer)
    assert (read.attributes, read.verdict, read.form) == (NAVY, Verdict.VALID, form)
    assert form in FORMS


@pytest.mark.parametrize(
    "answer, attributes",
    [
        ("color: navy, white; sleeve: long", {"color": "navy, white", "sleeve": "long"}),
        ("ratio: 16:9, time: 10:30, 11:45", {"ratio": "16:9", "time": "10:30, 11:45"}),
        ('screen: 24"; brand: L.L. Bean Inc.', {"screen": '24"', "brand": "L.L. Bean Inc."}),
        (
            '{"sleeve_length": "long", "pack": 3, "weight": {"value": 1.50, "unit": "kg"},'
            ' "waterproof": true, "colors": {"primary": "navy"}}',
            {"sleeve length": "long", "pack": "3", "weight": "1.50 kg", "waterproof": "yes"}
            | {"colors primary": "navy"},
        ),
        ("color: navy; Color: Navy", {"color": "navy"}),
        (
            "title: Star Wars, Part IV: A New Hope; brand: U.S. Polo Assn.; zip: no.",
            {"title": "Star Wars, Part IV: A New Hope", "brand": "U.S. Polo Assn.", "zip": "no"},
        ),
        (
            "In the box: charger. Max. load: 5 kg. No. of parts: 6; I/O ports: 2; output: 5 V",
            {"in the box": "charger", "max. load": "5 kg", "no. of parts": "6"}
            | {"i/o ports": "2", "output": "5 V"},
        ),
        ('{"Max. load": "5 kg"}', {"max. load": "5 kg"}),
        ('size: ["S", "M"]; color: red', {"size": "S, M", "color": "red"}),
        ("| Name | Value |\n|---|---|\n| color | red \\| blue |", {"color": "red | blue"}),
        ("颜色：蓝，材质：棉。", {"颜色": "蓝", "材质": "棉"}),
        (r"size\: eu: 40\; 41", {"size: eu": "40; 41"}),
    ],
)
def test_values_are_read_as_they_were_meant(answer, attributes):
    assert read_answer(answer).attributes == attributes
    assert read_answer(answer).verdict is Verdict.VALID


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry: I can't help with that.",
        "I'm sorry, but I can't tell.",
        "As an AI: I cannot see images",
        "抱歉：我无法查看图片",
        "Es tut mir leid: das kann ich nicht",
        '{"error": "the image could not be loaded"}',
        "The image shows a navy dress. Notable details: it has long sleeves and a zipper.",
        "Navy dress with long sleeves and a zipper: perfect for summer",
        "This product is best described as follows: a navy dress",
        "A fine mug.",
        '{"color": "navy" "sleeve": "long"}',
        '{"color": "navy"\n "sleeve": "long"}',
        '{"error": "status: 404"}',
        "[" * 5000,
    ],
)
def test_what_holds_no_attribute_is_refused(answer):
    read = read_answer(answer)
    assert (read.attributes, read.verdict) == ({}, Verdict.MALFORMED)


@pytest.mark.parametrize(
    "answer", ["", "{}", "color: unknown; size: N/A", "<think>color: navy; hm"]
)
def test_an_answer_that_says_nothing_is_empty(answer):
    assert read_answer(answer).verdict is Verdict.EMPTY


@pytest.mark.parametrize(
    "answer",
    [
        '{"color": "navy", "sleeve": "lo',
        '{"attributes": {"color": "navy", "sleeves": ["long", "wi',
        "color: navy; sle",
        "- Color: navy\n- Sleeve: lo",
        "| a | b |\n|---|---|\n| color | navy |\n| sleeve | lo",
    ],
)
def test_the_last_pair_of_an_answer_that_was_cut_is_not_trusted(answer):
    read = read_answer(answer, closed=False)
    assert (read.attributes, read.verdict) == ({"color": "navy"}, Verdict.UNCLOSED)


def test_json_that_lacks_its_end_is_not_valid_though_nobody_says_that_it_was_cut():
    assert read_answer('{"color": "navy", "sleeve": "lo').verdict is Verdict.MALFORMED


def test_two_values_of_one_name_are_told():
    for answer in ('{"color": "navy", "color": "red"}', "color: navy; COLOR: red"):
        read = read_answer(answer)
        assert (read.attributes, read.verdict) == ({"color": "navy"}, Verdict.DUPLICATE)


PLAIN = st.text("abcde é;,\\", min_size=3, max_size=9).map(lambda text: f"x{text}x")


@settings(max_examples=40)
@given(st.dictionaries(PLAIN.map(str.lower), PLAIN, max_size=5))
def test_our_own_format_is_read_as_the_strict_reader_reads_it(attributes):
    text = format_attributes({name.replace(",", ""): v for name, v in attributes.items()})
    assert read_answer(text).attributes == parse(text).attributes


@given(st.text(st.characters() | st.sampled_from('{}[]",:;\\|-*\n<>`')), st.booleans())
def test_any_text_is_read_without_an_error_into_normal_attributes(text, closed):
    read = read_answer(text, closed)
    assert normalise(read.attributes) == read.attributes
    assert closed or read.verdict is Verdict.UNCLOSED


@pytest.mark.parametrize(
    "unit",
    ["{", '{"a":', '["a: b",', '"', "' ", "\\\"", "|", "|---|\n", "*a*", "```", "<think>", "- ",
     "\t", ", a", "a, ", ":", ";", "a:a:", "<|", "sure, ", "1. ", " - ", " 1) ", "\t\t", "a. ",
     "・", "e\u0344"],
)  # fmt: skip
def test_hostile_answers_take_time_in_proportion_to_their_length(unit):
    """Some hundredths of a second each; squared they would take minutes."""
    start = time.process_time()
    read_answer("x" + unit * 50_000 + "y: z")
    assert time.process_time() - start < 10
