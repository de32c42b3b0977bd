import numpy as np
import pytest
from PIL import Image

from afmrl_jax.catalog.listings import Listing
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.fields import parse_mixture
from afmrl_jax.data.views import (
    VIEWS,
    Augmentation,
    TrainingViews,
    evaluation_row,
    listing_text,
)

PLAIN = Augmentation(1.0, 0.0, 0.0, 0.0, 0.0)


def listing(**changes):
    fields = {
        "listing_id": "a",
        "product_id": "p",
        "title": "Navy dress",
        "description": "Long sleeves, very fine.",
        "category": "Dresses",
        "attributes": {"color": "navy", "sleeve": "long"},
        "n_images": 1,
        "split": None,
    }
    return Listing(**fields | changes)


class Catalogue:
    """One listing, whose image is a ramp from left to right."""

    def __init__(self, **changes):
        self._listing = listing(**changes)

    def __len__(self):
        return 1

    def listing(self, index, draw=0):
        return self._listing

    def image(self, index, which=0, draw=0):
        return Image.fromarray(np.tile(np.arange(40, dtype=np.uint8)[None, :, None], (30, 1, 3)))


def rng():
    return np.random.default_rng(0)


def test_text_is_title_category_description_and_attributes_only_when_given():
    text = listing_text(listing())
    assert text == "Navy dress\nDresses\nLong sleeves, very fine."
    with_attributes = listing_text(listing(), {"color": "navy"})
    assert with_attributes == "Navy dress\nDresses\ncolor: navy\nLong sleeves, very fine."


@pytest.mark.parametrize(
    "view, has_text, images", [("image", False, 1), ("text", True, 0), ("image+text", True, 1)]
)
def test_a_view_shows_what_it_names(view, has_text, images):
    for row in (
        evaluation_row(Catalogue(), 0, 4, view=view),
        TrainingViews(Catalogue(), PLAIN, {}).row(0, view, rng(), draw=1),
    ):
        assert bool(row.text) == has_text
        assert len(row.images) == images


def test_a_training_view_of_a_listing_without_image_shows_its_text():
    assert TrainingViews(Catalogue(n_images=0), PLAIN, {}).row(0, "image", rng(), draw=1).text


def test_an_evaluation_row_holds_no_more_images_than_fit():
    row = evaluation_row(Catalogue(n_images=9), 0, 4, view="image")
    assert len(row.images) == 4


def test_a_crop_keeps_its_least_area_and_a_flip_mirrors():
    options = Augmentation(0.5, 1.0, 0.0, 0.0, 0.0)
    for seed in range(20):
        row = TrainingViews(Catalogue(), options, {}).row(
            0, "image", np.random.default_rng(seed), draw=1
        )
        image = row.images[0]
        assert 0.45 * 1200 <= image.width * image.height <= 1200
        pixels = np.asarray(image)[0, :, 0]
        assert (np.diff(pixels.astype(int)) == -1).all()


def test_shortened_text_keeps_half_of_the_words_in_order():
    row = TrainingViews(Catalogue(), PLAIN, {}).row(0, "text", rng(), draw=1, shorten=True)
    words = listing_text(listing()).split()
    kept = row.text.split()
    assert len(kept) == len(words) // 2
    places = [words.index(word) for word in kept]
    assert places == sorted(places)


def test_two_parts_of_a_listing_share_no_word_and_crop_the_photo_apart():
    options = Augmentation(0.3, 0.0, 1.0, 0.0, 0.0)
    whole = listing_text(listing(), listing().attributes).split()
    sizes = set()
    for seed in range(20):
        rows = TrainingViews(Catalogue(), options, {}).apart(
            0, ["image+text", "image+text"], np.random.default_rng(seed), draw=1
        )
        words = [row.text.split() for row in rows]
        # "Navy" and "navy;" are one word, "long" and "Long" are one: of nine, five and four.
        distinct = [{word.lower().strip(":;,.") for word in part} for part in words]
        assert [len(part) for part in distinct] == [5, 4] and not distinct[0] & distinct[1]
        assert sorted(words[0] + words[1]) == sorted(whole)
        for row, part in zip(rows, words):
            told = [row.text[start:end] for start, end in row.attributes]
            assert told == [word for word in part if word in ("color:", "navy;", "sleeve:", "long")]
        sizes.add(rows[0].images[0].size == rows[1].images[0].size)
    assert False in sizes


def test_a_part_shows_what_its_view_names_and_a_single_word_stands_in_both():
    views = TrainingViews(Catalogue(), PLAIN, {})
    first, second = views.apart(0, ["image", "text"], rng(), draw=1)
    assert (first.text, len(first.images), len(second.images)) == ("", 1, 0)
    assert len(second.text.split()) == 3  # of 7
    views = TrainingViews(
        Catalogue(title="Dress", category="", description="", n_images=0), PLAIN, {}
    )
    rows = views.apart(0, ["image+text", "text"], rng(), draw=1)
    assert [(row.text, row.images) for row in rows] == [("Dress", ())] * 2


def test_attributes_join_a_share_of_the_texts_with_some_left_out():
    options = Augmentation(1.0, 0.0, 0.5, 0.5, 0.0)
    generator = rng()
    texts = [
        TrainingViews(Catalogue(), options, {}).row(0, "text", generator, draw=1).text
        for _ in range(400)
    ]
    shown = sum("color: navy" in text for text in texts)
    assert 60 < shown < 140  # .5 x .5 of 400


def test_a_share_of_the_values_is_that_of_another_listing_of_the_category():
    others = {"Dresses": [{"color": "red"}], "Mugs": [{"color": "blue", "sleeve": "none"}]}
    options = Augmentation(1.0, 0.0, 1.0, 0.0, 0.25)
    generator = rng()
    texts = [
        TrainingViews(Catalogue(), options, others).row(0, "text", generator, draw=1).text
        for _ in range(400)
    ]
    wrong = sum("color: red" in text for text in texts)
    assert 65 < wrong < 135  # .25 of 400
    assert all("sleeve: long" in text for text in texts)  # the other has no sleeve
    assert not any("blue" in text for text in texts)


@pytest.mark.parametrize(
    "text, told",
    [
        ("image 0.5, txt 0.5", "'txt', expected one of"),
        ("image 0.5", "sum to 0.5"),
        ("text x", "'x'"),
    ],
)
def test_a_mixture_that_makes_no_sense_names_its_field(text, told):
    with pytest.raises(UserError, match=told) as error:
        parse_mixture(text, "data.query_views", VIEWS)
    assert "data.query_views" in str(error.value)


def test_a_mixture_reads_views_and_shares():
    views, shares = parse_mixture("image+text 0.75, text 0.25", "f", VIEWS)
    assert views == ("image+text", "text")
    np.testing.assert_allclose(shares, [0.75, 0.25])
