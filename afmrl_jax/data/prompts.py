"""Prompts: the tokens that stand around a row's images and its text.

`PlainPrompt` is images, instruction, text, end; `ChatPrompt` a model's own chat template. Both give
a `Frame` for a number of images. A listing's text is never rendered by a template: it is put into
the frame and tokenised as ordinary text, so no listing can forge the end of a turn, while any other
text gives exactly the tokens of transformers' `apply_chat_template` and tokenizer.
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer

from afmrl_jax.core.errors import UserError
from afmrl_jax.data.tokenizer import (
    END_OF_TEXT,
    END_OF_TURN,
    IMAGE_PAD,
    encode_text,
    read_json,
    special_token_ids,
)

log = logging.getLogger(__name__)

# The template of Qwen2-VL and Qwen2.5-VL, for models that come without one.
CHATML = """\
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif 'text' in part %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
GENERIC_WORDS = "You are a helpful assistant."  # the system's, of models not trained to embed
# Stand-ins for text while a template is rendered: private characters between spaces. The spaces
# must come back too: a template that strips them would also change real text.
_TEXT, _INSTRUCTION = " \ue000text\ue001 ", " \ue000instruction\ue001 "


@dataclass(frozen=True)
class Frame:
    """A prompt for some number of images: tokens, a piece of ordinary text, tokens.

    <|image_pad|> stands once for each image; the processor repeats it for the image's features.
    """

    head: list[int]
    prefix: str  # begins the piece, in one tokenisation with the row's text
    joint: str  # between prefix and text, where there is text
    tail: list[int]

    def piece(self, text: str) -> str:
        """The text between head and tail, which the tokenizer must see whole."""
        return f"{self.prefix}{self.joint}{text}" if text else self.prefix


class Prompt(Protocol):
    """How rows are laid out; tokenizer: a `text_tokenizer`."""

    def frame(self, n_images: int, tokenizer: Tokenizer) -> Frame: ...


@dataclass(frozen=True)
class PlainPrompt:
    """Images, the instruction on a line of its own, the text, <|endoftext|>."""

    instruction: str = ""

    def frame(self, n_images: int, tokenizer: Tokenizer) -> Frame:
        ids = special_token_ids(tokenizer)
        names = ("vision_start_token_id", "image_token_id", "vision_end_token_id")
        image = [ids[name] for name in names]
        joint = "\n" if self.instruction else ""
        return Frame(image * n_images, self.instruction, joint, [ids["pad_token_id"]])


@dataclass(frozen=True)
class ChatPrompt:
    """A chat template's system turn, user turn of images and text, and start of the answer.

    template: Jinja, as in a Hugging Face folder (`chat_template`). instruction: the system's words;
    "" leaves them to the template. end: a special token to close with, on which an embedder pools
    (Qwen3-VL-Embedding, GME: <|endoftext|>); "" for a generator, which goes on from there.
    """

    template: str
    instruction: str = ""
    end: str = ""

    def frame(self, n_images: int, tokenizer: Tokenizer) -> Frame:
        """Raises UserError where the template is empty or broken, changes the text, does not end it
        with a special token, or shows another number of images.
        """
        rendered = self._rendered(n_images) + self.end
        added = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
        names = "|".join(map(re.escape, sorted(added, key=len, reverse=True)))
        pieces = re.split(f"({names})", rendered)
        # Special tokens stand at the odd places, ordinary text at the even ones.
        at = [i for i, piece in enumerate(pieces) if _TEXT in piece]
        if len(at) != 1 or not pieces[at[0]].endswith(_TEXT) or at[0] == len(pieces) - 1:
            raise UserError(
                f"the chat template does not put the user's text, unchanged and once, before a "
                f"special token; of {_TEXT!r} it makes {rendered!r}: use the model's own template"
            )

        def encode(start: int, stop: int) -> list[int]:
            ids: list[int] = []
            for i, piece in enumerate(pieces[start:stop], start):
                text = self._with_instruction(piece)
                ids += [added[piece]] if i % 2 else encode_text(tokenizer, text)
            return ids

        prefix = self._with_instruction(pieces[at[0]].removesuffix(_TEXT))
        frame = Frame(encode(0, at[0]), prefix, "", encode(at[0] + 1, len(pieces)))
        shown = (frame.head + frame.tail).count(added[IMAGE_PAD])
        if shown != n_images:
            raise UserError(
                f"the chat template shows {shown} of {n_images} images: use a Qwen-VL model's"
            )
        return frame

    def _rendered(self, n_images: int) -> str:
        system = [_turn("system", _INSTRUCTION)] if self.instruction else []
        rendered = _rendered(self.template, [*system, _turn("user", _TEXT, n_images)])
        if self.instruction and rendered.count(_INSTRUCTION) != 1:
            raise UserError(
                "the chat template does not show the system's instruction, unchanged and once: "
                'use the model\'s own template, or data.instruction = ""'
            )
        return rendered

    def _with_instruction(self, piece: str) -> str:
        return piece.replace(_INSTRUCTION, self.instruction)


def _turn(role: str, text: str, images: int = 0) -> dict[str, Any]:
    parts = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    return {"role": role, "content": parts}


def _rendered(template: str, chat: list[dict[str, Any]]) -> str:
    """Raises UserError where the template is empty or broken."""
    if not template:
        raise UserError(
            "the model has no chat template: put its chat_template.jinja into its folder, or "
            'choose the plain prompt, data.prompt = "plain"'
        )
    # Imported here, so that worker processes, whose frames come with the processor, start at once.
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    answering = chat[-1]["role"] != "assistant"
    try:
        [rendered], _ = render_jinja_template(
            conversations=[chat], chat_template=template, add_generation_prompt=answering
        )
    except (TemplateError, TypeError) as error:
        raise UserError(
            f"the chat template cannot be rendered ({error}): use the model's own"
        ) from error
    return rendered


def end_of_turn(template: str, tokenizer: Tokenizer) -> str:
    """The special token that a chat template puts behind an assistant's words; <|im_end|> where it
    puts no special token of the tokenizer there, or cannot be rendered."""
    words = _TEXT.strip()
    try:
        rendered = _rendered(template, [_turn("user", "?"), _turn("assistant", words)])
    except UserError:  # the processor raises it where the template is needed
        return END_OF_TURN
    added = tokenizer.get_added_tokens_decoder().values()
    names = sorted((token.content for token in added), key=len, reverse=True)
    end = re.search("|".join(map(re.escape, names)), rendered.partition(words)[2])
    return end[0] if end else END_OF_TURN


def system_words(template: str) -> str:
    """The system's words that a chat template puts before a chat that has none; "" without any."""
    user = _turn("user", _TEXT)
    try:
        default = _rendered(template, [user])
        before, _, after = _rendered(template, [_turn("system", _INSTRUCTION), user]).partition(
            _INSTRUCTION
        )
    except UserError:
        return ""
    has_turn = default.startswith(before) and default.endswith(after) and after
    return default[len(before) : -len(after)] if has_turn else ""


def tell_system_words(model: str, prompt: str, template: str, instruction: str) -> None:
    """Logs the system's words before rows to embed, where the configuration has none.

    model: its name; prompt: plain or chat. Some models are published to read certain words:
    Qwen3-VL-Embedding reads "Represent the user's input.", which its template says.
    """
    words = "" if instruction else system_words(template)
    if prompt == "chat" and words:
        log.info("%s: the system says %r, from the model's folder", model, words)
    elif prompt == "chat" and not instruction:
        log.warning(
            "%s: no words are said as the system: its folder has none, and data.instruction is "
            "empty. If the model was published to read some, give them there",
            model,
        )
    elif prompt == "plain" and words not in ("", GENERIC_WORDS):
        log.warning(
            "%s: its chat template says %r as the system, which data.prompt=plain leaves out, with "
            "the turns around it: data.prompt=chat makes rows as the model was published to read "
            "them",
            model,
            words,
        )


def embedding_prompt(name: str, template: str, instruction: str) -> Prompt:
    """The embedder's prompt by its name in a configuration (`data.prompt`): plain or chat."""
    if name == "plain":
        return PlainPrompt(instruction)
    if name == "chat":
        return ChatPrompt(template, instruction, end=END_OF_TEXT)
    raise UserError(f"data.prompt is {name!r}: use plain or chat")


def chat_template(folder: Path) -> str:
    """The chat template of a Hugging Face folder, from a file that transformers reads; "" if none.

    Raises UserError where a file that may hold it is not JSON.
    """
    if (path := folder / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        path = folder / name
        content = read_json(path) if path.is_file() else {}
        template = content.get("chat_template") if isinstance(content, Mapping) else None
        if isinstance(template, list):  # several, by name
            entries = [entry for entry in template if isinstance(entry, Mapping)]
            template = {str(e.get("name")): e.get("template") for e in entries}.get("default")
        if template and isinstance(template, str):
            return template
    return ""


def embedder_template(folder: Path, template: str) -> str:
    """The chat template, with the prompt of sentence-transformers as the system's words.

    The prompt is the default one of the folder's config_sentence_transformers.json; where that
    names no default and the template has no words itself, its only prompt. Where there are several
    the log names them, and the template stays as it is.
    """
    path = folder / "config_sentence_transformers.json"
    content = read_json(path) if template and path.is_file() else {}
    prompts = content.get("prompts") if isinstance(content, Mapping) else None
    if not isinstance(prompts, Mapping):
        return template
    words = prompts.get(str(content.get("default_prompt_name")))
    if not words and not system_words(template):
        several = {text for text in prompts.values() if text and isinstance(text, str)}
        words = several.pop() if len(several) == 1 else ""
        if several:
            log.warning(
                "%s has several prompts, and no default among them: %s. None is said; give the one "
                "for your rows as data.instruction",
                path,
                json.dumps(prompts, ensure_ascii=False),
            )
    if not words or not isinstance(words, str):
        return template
    turn = f'{{"role": "system", "content": {json.dumps(words, ensure_ascii=False)}}}'
    return (
        "{%- if messages[0].role != 'system' %}{%- set messages = ["
        + turn
        + "] + messages %}{%- endif %}"
        + template
    )
