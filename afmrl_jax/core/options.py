"""Settings as small frozen dataclasses. A class declares each field's range or words; only the
configuration page has its value.

    @dataclass(frozen=True)
    class Contrastive(Options, section="loss"):
        temperature: float = between(1e-4, 10)
        negative_weight: str = among("none", "bm25", "similarity")
        symmetric: bool

    options = Contrastive.of(config)  # config.loss.temperature, ...
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

from afmrl_jax.core.errors import UserError
from afmrl_jax.core.fields import check_choice, check_range

# The types of fields that are checked -> what a user should give.
TYPES = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}


def between(low: float, high: float = math.inf) -> Any:
    """The field of a number from `low` to `high`, both allowed."""
    return dataclasses.field(metadata={"range": (low, high)})


def among(*words: str) -> Any:
    """The field of one of these words."""
    return dataclasses.field(metadata={"words": words})


class Options:
    """The base of frozen dataclasses whose fields are those of a configuration's section.

    section: the section's dotted name; "" for the fields outside all sections. Each new object's
    values are checked. A field whose type is an Options class is read by that class's `of`.
    """

    section: ClassVar[str] = ""

    def __init_subclass__(cls, section: str | None = None, **more: Any) -> None:
        super().__init_subclass__(**more)
        if section is not None:
            cls.section = section

    @classmethod
    def of(cls, config: Mapping[str, Any] | Any) -> Self:
        """Reads the fields from a whole configuration, a ConfigDict or a dict.

        Raises UserError, which names the field as a flag does, for a missing value, one outside its
        range and one of another type.
        """
        part = config
        for name in filter(None, cls.section.split(".")):
            part = part.get(name, {})
        values = {}
        for field in dataclasses.fields(cls):
            if isinstance(field.type, type) and issubclass(field.type, Options):
                values[field.name] = field.type.of(config)
                continue
            if field.name not in part:
                raise UserError(f"{cls.name_of(field.name)} is missing from the configuration")
            value = part[field.name]
            values[field.name] = float(value) if field.type is float else value
        return cls(**values)

    def further(self) -> Iterable[type["Options"]]:
        """Options that are read beside these, for a value that names a class with settings."""
        return ()

    @classmethod
    def name_of(cls, field: str) -> str:
        """The dotted name of a field, as a flag gives it."""
        return f"{cls.section}.{field}" if cls.section else field

    @classmethod
    def names(cls) -> set[str]:
        """The dotted names of all fields, those of options within these options among them."""
        names = set()
        for field in dataclasses.fields(cls):
            nested = isinstance(field.type, type) and issubclass(field.type, Options)
            names |= field.type.names() if nested else {cls.name_of(field.name)}
        return names

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, value = self.name_of(field.name), getattr(self, field.name)
            if words := field.metadata.get("words"):
                check_choice(name, value, words)
            elif field.type in TYPES and not _is_a(field.type, value):
                raise UserError(f"{name} is {value!r}: give {TYPES[field.type]}")
            elif bounds := field.metadata.get("range"):
                check_range(name, value, *bounds)


def _is_a(kind: type, value: object) -> bool:
    """Whether a value is of a kind: True is no number, a whole number is one, and nan is none."""
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float) and value == value
    return isinstance(value, kind)


def check_options(config: Any, options: Iterable[type[Options]], prefix: str = "") -> None:
    """Raises UserError for the first field of these options, and of those that their values name
    (`further`), that is missing or out of range.

    prefix: stands before the field's name in the message; "rar.", for example, where `config` is
    that section of a larger configuration.
    """
    for options_class in options:
        try:
            chosen = options_class.of(config)
        except UserError as error:
            raise UserError(f"{prefix}{error}") from None
        check_options(config, chosen.further(), prefix)
