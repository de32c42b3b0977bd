"""Tokenizers of the Qwen2-VL kind: the real one from its folder, or one trained on a catalogue.

Both are a plain `tokenizers.Tokenizer`: byte-level BPE, NFC, Qwen2's pre-tokenisation and the same
special tokens by name. Callers find ids by a token's name, never by a number.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel

from afmrl_jax.core.errors import UserError
from afmrl_jax.models.config import VISION_TOKEN, listed

END_OF_TEXT = "<|endoftext|>"
END_OF_TURN = "<|im_end|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
IMAGE_PAD = "<|image_pad|>"
# In the order of Qwen2-VL's tokenizer, after the vocabulary.
SPECIAL_TOKENS = (
    END_OF_TEXT,
    "<|im_start|>",
    END_OF_TURN,
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    VISION_START,
    VISION_END,
    "<|vision_pad|>",
    IMAGE_PAD,
    "<|video_pad|>",
)
_BYTES = 256


def clean_text(text: str) -> str:
    """The same text as valid Unicode: surrogate pairs joined, lone surrogates replaced by U+FFFD.

    JSON can carry a lone surrogate into a Python string; no tokenizer accepts one.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most vocab_size tokens, special tokens counted; equal for equal texts.

    A special token's name among the texts is ordinary text. Few texts may not hold enough pairs to
    fill vocab_size: read the true size from `get_vocab_size()`.
    Raises UserError where vocab_size leaves no room for the 256 bytes and the special tokens.
    """
    least = _BYTES + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise UserError(
            f"vocab_size={vocab_size} is below {least}, the {_BYTES} bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens that every tokenizer needs: raise it"
        )
    # Imported here: transformers takes a second to import (with torch installed, four).
    from transformers import Qwen2Tokenizer

    qwen = Qwen2Tokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = qwen.normalizer
    tokenizer.pre_tokenizer = qwen.pre_tokenizer
    tokenizer.decoder = qwen.decoder
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        min_frequency=2,
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((clean_text(text) for text in texts), trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return tokenizer


def text_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """A copy for `encode_text`, without padding or truncation.

    Each of its added tokens counts as special, "<think>" or "<|fim_prefix|>" too, which the
    published tokenizers leave out: whoever writes a listing could otherwise forge them.
    """
    copy = Tokenizer.from_str(tokenizer.to_str())
    names = [token.content for token in copy.get_added_tokens_decoder().values()]
    copy.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    copy.no_padding()
    copy.no_truncation()
    return copy


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of ordinary text: a special token's name in it is split as the letters that it is.

    tokenizer: a `text_tokenizer`. Surrogates are cleaned (`clean_text`).
    """
    # Set at every call, because pickling forgets it.
    tokenizer.encode_special_tokens = True
    # One text at a time: a batch would start the tokenizer's threads in every worker process.
    return tokenizer.encode(clean_text(text), add_special_tokens=False).ids


def read_json(path: Path) -> Any:
    """A JSON file's content. Raises UserError where it is not JSON; a missing file as `open`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}): fetch or make it again") from None


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, or of a tokenizer.json, as saved by `Tokenizer.save`.

    A folder is read from its tokenizer.json, else from vocab.json, merges.txt and the added tokens
    of tokenizer_config.json. Raises UserError where these are missing or cannot be read.
    """
    path = Path(path)
    file = path if path.is_file() else path / "tokenizer.json"
    parts = [path / name for name in ("vocab.json", "merges.txt", "tokenizer_config.json")]
    if not file.is_file() and (missing := [part.name for part in parts if not part.is_file()]):
        raise UserError(
            f"{path} holds no tokenizer: neither tokenizer.json nor {', '.join(missing)}; "
            f"name a folder of a Hugging Face Qwen-VL model"
        )
    try:
        if file.is_file():
            return Tokenizer.from_file(str(file))
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(path, local_files_only=True).backend_tokenizer
    except Exception as error:  # tokenizers raises bare Exception for a file that it cannot parse
        raise UserError(
            f"the tokenizer in {path} cannot be read ({error}): fetch or make it again"
        ) from error


def special_token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The fields of a `QwenVLConfig` that belong to its tokenizer, found by name.

    A turn of chat ends with <|im_end|> (eos); a row to embed ends, and is padded, with
    <|endoftext|>.
    Raises UserError where a token is missing: then the tokenizer is not of the Qwen-VL family.
    """
    names = {
        "image_token_id": IMAGE_PAD,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "eos_token_id": END_OF_TURN,
        "pad_token_id": END_OF_TEXT,
    }
    ids = {key: tokenizer.token_to_id(name) for key, name in names.items()}
    if missing := [names[key] for key, token_id in ids.items() if token_id is None]:
        raise UserError(
            f"the tokenizer has no {', '.join(missing)}: use a Qwen-VL model's, or train one"
        )
    return ids


def named_end_ids(
    tokenizer: Tokenizer, described: Mapping[str, Any], folder: Path | None = None
) -> tuple[int, ...]:
    """The tokens that end an answer according to a model's files, each once, in the files' order.

    described: the content of config.json; eos_token_id is read from it and from its text_config.
    folder: the folder of generation_config.json, whose eos_token_id is read too, and of
    tokenizer_config.json and special_tokens_map.json, whose eos_token is read; None for a
    checkpoint of ours. Each file and field may be absent; a field may be null or a list.
    Raises UserError, naming the folder's file, for a token that can end no answer.
    """
    nested = described.get("text_config")
    files = [("config.json", part) for part in (described, nested) if isinstance(part, Mapping)]
    for name in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        content = read_json(folder / name) if folder and (folder / name).is_file() else {}
        files += [(name, content)] if isinstance(content, Mapping) else []
    added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
    ids = []
    for name, content in files:
        field = "eos_token" if name.startswith(("tokenizer", "special")) else "eos_token_id"
        for value in listed(content.get(field)):
            token = value.get("content") if isinstance(value, Mapping) else value
            token_id = tokenizer.token_to_id(token) if isinstance(token, str) else token
            known = added.get(token_id) if type(token_id) is int else None
            if known and not VISION_TOKEN.fullmatch(known):
                ids.append(token_id)
            elif folder:
                raise UserError(
                    f"{name}: {field} is {token!r}, {known or 'no special token'} of the "
                    f"tokenizer, which can end no answer: write {END_OF_TURN} there, which is "
                    f"{tokenizer.token_to_id(END_OF_TURN)}, or take all files from one model"
                )
    return tuple(dict.fromkeys(ids))
