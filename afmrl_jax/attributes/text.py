"""Attributes as text."""

from collections.abc import Mapping


def format_attributes(attributes: Mapping[str, str]) -> str:
    """ "name: value; name: value", in the order given."""
    return "; ".join(f"{name}: {value}" for name, value in attributes.items())
