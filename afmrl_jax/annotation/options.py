"""The fields of a configuration that describe an endpoint, and what it is sent."""

from dataclasses import dataclass

from afmrl_jax.core.options import Options, between


@dataclass(frozen=True)
class EndpointQuestion(Options, section=""):
    """The part of a listing that is sent to a model behind an endpoint."""

    prompt: str  # text before that of the listing
    images: int = between(0)  # first images of the listing
    image_side: int = between(16, 10_000)  # pixels of the longest side, at most
    text_characters: int = between(0)  # first characters of its text


@dataclass(frozen=True)
class Api(Options, section="api"):
    """An OpenAI-compatible endpoint."""

    base_url: str
    model: str  # name of the model at the endpoint
    key_variable: str  # the environment variable that holds the key
    concurrency: int = between(1, 1000)  # requests at once
    timeout: float = between(0.01, 3600)  # seconds of silence of a server
    retries: int = between(0, 100)  # of a request
    options: str  # JSON sent with each request


@dataclass(frozen=True)
class BudgetLimits(Options, section="budget"):
    """Limits for one start of the program; 0: no limit."""

    requests: int = between(0)  # retries included
    tokens: int = between(0)  # of prompts, images and answers
