import pytest

from afmrl_jax.attributes.identifiers import find_identifiers


def frequencies(name: str, values) -> dict[str, int]:
    return {f"{name}={value}": 1 for value in values}


@pytest.mark.parametrize(
    "values",
    [
        [f"https://shop.example/p/{i}" for i in range(100)],
        [f"{i:032x}" for i in range(100)],
        [f"978 3 16 {148410 + i} 0" for i in range(100)],
        [f"navy-dress-{i}" for i in range(100)],
        [str(i) for i in range(0, 300, 3)],  # a numbering, of which some are missing
    ],
)
def test_codes_that_nearly_every_product_has_alone_are_identifiers_whatever_their_name(values):
    assert find_identifiers(frequencies("whatever", values)) == {"whatever": 100}
    assert not find_identifiers(frequencies("whatever", values[:50]))  # may be chance


@pytest.mark.parametrize(
    "values",
    [
        [f"air max {i} pro" for i in range(200)],  # a model's name agrees in its words
        [f"{i * 0.37:.2f} kg" for i in range(200)],
        [f"{i}x{i + 7} cm" for i in range(200)],
        [f"{(i * i * 37) % 90001}" for i in range(200)],  # grams
        [f"rs. {(i * i * 37) % 90001}" for i in range(200)],
        [f"us${i * 0.37:.2f}" for i in range(200)],
        [f'{i}"w x {i + 7}"d x 30"h' for i in range(200)],
        [f"{i} cm x {i + 7} cm x 3 cm" for i in range(200)],
        [f"l{i} w{i + 7} h30" for i in range(200)],
        [f"{i % 28 + 1}.3.{1800 + i}" for i in range(200)],
        ["a", "b"] * 100,
    ],
)
def test_what_tells_of_a_product_is_none_though_no_two_are_equal(values):
    assert not find_identifiers(frequencies("whatever", values))


@pytest.mark.parametrize("name", ["sku", "ean-13", "product id", "item_number", "page url", "mpn"])
def test_ten_products_tell_of_what_is_named_an_identifier(name):
    values = [f"{i}" for i in range(10)]
    assert find_identifiers(frequencies(name, values)) == {name: 10}
    assert not find_identifiers(frequencies(name, values[:9]))
    assert not find_identifiers({f"{name}=a": 5, f"{name}=b": 5})


@pytest.mark.parametrize("name", ["width", "grid", "liquid", "idea", "video"])
def test_a_name_that_only_holds_such_letters_is_none(name):
    assert not find_identifiers(frequencies(name, [f"{i}" for i in range(10)]))
