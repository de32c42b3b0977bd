"""How sellers write: titles that drop, abbreviate, translate, reorder and decorate."""

import random
from collections.abc import Mapping

from afmrl_jax.catalog.builtin import words

# How hard the text is: what a seller bothers to say.
TITLE_SHARE = 0.74  # of the attributes
TITLE_SILENT_SHARE = 0.45  # of what is not there ("no pocket", "plain")
DESCRIPTION_SHARE = 0.3  # of the attributes, where there is a description at all
NO_DESCRIPTION_SHARE = 0.4
BRAND_SHARE = 0.8
NOUN_SHARE = 0.9
VAGUE_COLOUR_SHARE = 0.2  # of the colours that are said
LANGUAGE_WEIGHTS = {"en": 0.56, "short": 0.16, "de": 0.07, "fr": 0.07, "es": 0.07, "it": 0.07}

_DECORATIONS = {
    "en": ("NEW", "BNWT", "free shipping", "SALE", "top quality", "great gift", "last one!"),
    "short": ("NWT", "EUC", "sz M", "s/h", "L@@K", "obo"),
    "de": ("NEU", "Top Zustand", "Versand gratis", "wie neu", "Geschenkidee"),
    "fr": ("NEUF", "très bon état", "livraison offerte", "promo", "idée cadeau"),
    "es": ("NUEVO!!", "envío gratis", "oferta", "buen estado", "ideal regalo"),
    "it": ("NUOVO", "spedizione gratis", "come nuovo", "offerta", "idea regalo"),
}
_SENTENCES = {
    "en": (
        "Details: {}.",
        "You get: {}. Ships next day.",
        "{}. Smoke-free home.",
        "As pictured, {}.",
    ),
    "short": ("{}. As is.", "{}, see pics", "Cond: good. {}."),
    "de": ("Details: {}. Versand per Post.", "{}. Privatverkauf, keine Rücknahme."),
    "fr": ("Détails : {}. Envoi rapide.", "{}. Visible sur les photos."),
    "es": ("Detalles: {}. Envío en 24 h.", "{}. Mira las fotos."),
    "it": ("Dettagli: {}. Spedizione rapida.", "{}. Vedi foto."),
}
_SEPARATORS = (" ", " ", ", ", " - ", " | ", " / ")


def write(rng: random.Random, category: str, attributes: Mapping[str, str]) -> tuple[str, str]:
    """A title and a description (perhaps empty) of one product by one seller."""
    language = rng.choices(list(LANGUAGE_WEIGHTS), list(LANGUAGE_WEIGHTS.values()))[0]
    said = [
        _say(rng, name, value, language)
        for name, value in attributes.items()
        if name != "brand" and rng.random() < _share(value)
    ]
    if rng.random() < 0.7:
        rng.shuffle(said)
    noun = [words.say(category, language)] if rng.random() < NOUN_SHARE else []
    brand = [attributes["brand"]] if rng.random() < BRAND_SHARE else []
    title = _arrange(rng, language, brand, noun, said) or words.say(category, language)

    description = ""
    if rng.random() >= NO_DESCRIPTION_SHARE:
        more = [
            _say(rng, name, value, language)
            for name, value in attributes.items()
            if name != "brand" and rng.random() < DESCRIPTION_SHARE
        ]
        rng.shuffle(more)
        sentence = rng.choice(_SENTENCES[language])
        description = sentence.format(", ".join(more or [words.say(category, language)]))
    return title, description[:1].upper() + description[1:]


def _share(value: str) -> float:
    return TITLE_SILENT_SHARE if value.startswith(("no ", "plain")) else TITLE_SHARE


def _say(rng: random.Random, name: str, value: str, language: str) -> str:
    if name == "color" and rng.random() < VAGUE_COLOUR_SHARE:
        return words.VAGUE[value]
    return words.say(value, language, name)


def _arrange(
    rng: random.Random, language: str, brand: list[str], noun: list[str], said: list[str]
) -> str:
    """Puts the parts of a title in an order that sellers use, and decorates it."""
    split = rng.randint(0, len(said))
    body = rng.choice(
        (
            brand + noun + said,
            brand + said + noun,
            said[:split] + noun + said[split:] + brand,
            noun + brand + said,
        )
    )
    title = rng.choice(_SEPARATORS).join(body)
    if rng.random() < 0.25:
        title = title.upper() if rng.random() < 0.4 else title.title()
    if rng.random() < 0.5:
        decoration = rng.choice(_DECORATIONS[language])
        title = f"{decoration} {title}" if rng.random() < 0.4 else f"{title} {decoration}"
    return title.strip()
