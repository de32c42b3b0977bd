"""The encoder for sentence-transformers: exported folders carry this file and run it themselves.

`SentenceTransformer(FOLDER, trust_remote_code=True).encode([...])` takes a text, an image, or
{"text": "...", "image": image or [image, ...]}; listing_rows.py, beside it, makes the rows.

Axes: N rows · S tokens of the longest · D width of the model · E dimensions kept of D.
"""

import json
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.modality import infer_modality
from sentence_transformers.sentence_transformer.modules import InputModule
from tokenizers import Tokenizer
from transformers import AutoModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from .listing_rows import ListingRows  # a neighbour here and in exported folders


class SentenceEncoder(InputModule, ListingRows):
    """A Qwen-VL model whose tokens' states sentence-transformers pools.

    embedding_dim: first dimensions kept of each state, 0 = all; the rest as `ListingRows`.
    """

    config_file_name = "sentence_bert_config.json"
    config_keys = [*ListingRows.rows_keys, "embedding_dim"]  # noqa: RUF012 as the base class has it

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Tokenizer,
        image_processor: Qwen2VLImageProcessorPil,
        **config: Any,
    ):
        InputModule.__init__(self)
        ListingRows.__init__(self, tokenizer, image_processor, **config)
        self.model, self.embedding_dim = model, config["embedding_dim"]

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        **_: Any,
    ) -> "SentenceEncoder":
        """The encoder of a folder, or of a name on the hub; the signature is the library's.

        processor_kwargs: min_pixels, max_pixels and model_max_length (max_seq_length).
        Raises ValueError for other processor_kwargs, and for config_kwargs.
        """
        changes = dict(processor_kwargs or {})
        length = changes.pop("model_max_length", None)
        unread = [*(changes.keys() - {"min_pixels", "max_pixels"}), *(config_kwargs or {})]
        if unread:
            raise ValueError(
                f"{', '.join(sorted(unread))}: this model's rows are made as in training, and of "
                "processor_kwargs only min_pixels, max_pixels and model_max_length count"
            )
        hub = {"token": token, "revision": revision, "local_files_only": local_files_only}
        model = AutoModel.from_pretrained(
            model_name_or_path, cache_dir=cache_folder, **hub, **(model_kwargs or {})
        )
        images = Qwen2VLImageProcessorPil.from_pretrained(
            model_name_or_path, cache_dir=cache_folder, **hub
        )
        hub["cache_folder"] = cache_folder
        tokenizer = cls.load_file_path(model_name_or_path, "tokenizer.json", **hub)
        config = cls.load_config(model_name_or_path, **hub) | changes
        encoder = cls(model, Tokenizer.from_file(tokenizer), images, **config)
        if length is not None:
            encoder.max_seq_length = length
        return encoder

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        self.model.save_pretrained(output_path)
        self.tokenizer.save(str(Path(output_path) / "tokenizer.json"))
        self.image_processor.save_pretrained(output_path)
        config = json.dumps(self.get_config_dict(), indent=2)
        (Path(output_path) / self.config_file_name).write_text(config + "\n", encoding="utf-8")

    @property
    def modalities(self) -> list:
        # sentence-transformers also names a batch of several kinds "message".
        return ["text", "image", ("image", "text"), "message"]

    @property
    def max_seq_length(self) -> int:
        """The most tokens of a row, images and prompt included; a longer text loses its end."""
        return self.max_tokens

    @max_seq_length.setter
    def max_seq_length(self, tokens: int) -> None:
        """Raises ValueError for less than the prompt and images of max_patches take."""
        least = self.least_tokens
        # Whole numbers have __index__, NumPy's too; so has True, but 64.0 has not.
        if isinstance(tokens, bool) or not hasattr(tokens, "__index__") or tokens < least:
            raise ValueError(
                f"max_seq_length is {tokens!r}: expected a whole number of at least {least}, which "
                f"the prompt and images of {self.max_patches} patches take; for shorter rows let "
                f"images take less first, as by model[0].max_patches = {self.max_patches // 2}"
            )
        self.max_tokens = int(tokens)

    def get_embedding_dimension(self) -> int:
        return self.embedding_dim or self.model.config.get_text_config().hidden_size

    def preprocess(
        self,
        inputs: list,
        prompt: str | None = None,
        processing_kwargs: dict[str, Any] | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """The model's inputs, as `ListingRows.inputs` gives them."""
        if processing_kwargs:
            raise ValueError(
                f"processing_kwargs {processing_kwargs} do not count, as rows are made as in "
                "training: set model.max_seq_length, or model[0].max_pixels, once"
            )
        return dict(self.inputs([_listing(row) for row in inputs], prompt or ""))

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Adds token_embeddings [N, S, E], the model's last states."""
        states = self.model(**features, use_cache=False).last_hidden_state
        return features | {"token_embeddings": states[..., : self.embedding_dim or None].float()}


def _listing(row: Any) -> dict[str, Any]:
    """An input in any form of sentence-transformers as {"text", "image"}."""
    if infer_modality(row) == "message":
        messages = row if isinstance(row, list) else [row]
        contents = [message["content"] for message in messages]
        parts = [part for c in contents for part in ([{"text": c}] if isinstance(c, str) else c)]
        return {
            "text": "\n".join(part["text"] for part in parts if part.get("text")),
            "image": [part["image"] for part in parts if part.get("image") is not None],
        }
    return row if isinstance(row, dict) else {infer_modality(row): row}
