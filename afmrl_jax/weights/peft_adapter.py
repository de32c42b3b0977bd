"""A folder of PEFT's: LoRA's matrices without the weights that they stand on, which lie elsewhere.

PEFT (https://github.com/huggingface/peft) computes W + alpha / r B A for each weight W that has
them (alpha / sqrt(r) with rsLoRA); theirs are A [r, D] and B [O, r], ours A [D, r] and B [r, *O]
with the scale within B. All else that PEFT can train is refused: its numbers would be missing.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from afmrl_jax.core.errors import UserError
from afmrl_jax.models.config import QwenVLConfig
from afmrl_jax.models.lora import LoRA
from afmrl_jax.weights.hf_weights import FAMILIES, HEAD, INDEX, MODULES, PREFIX, SINGLE, targets
from afmrl_jax.weights.safetensors_file import Tensor, read_header

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight")
# Of adapter_config.json what plain LoRA may say; anything else must be off.
PLAIN = (
    *("r", "lora_alpha", "use_rslora", "base_model_name_or_path", "revision", "peft_type"),
    *("task_type", "auto_mapping", "inference_mode", "lora_dropout", "peft_version"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("init_lora_weights", "bias", "megatron_core", "qalora_group_size", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config"),  # options of what init_lora_weights names
)
OFF = (None, False, "", [], {})
# Other ways to begin subtract from the base's weights, and the saved matrices count from there.
INITIAL = (None, "gaussian", "eva", "orthogonal")  # True and False too


@dataclass(frozen=True)
class Adapter:
    """What a folder's two files say. tensors: (A, B) by their module's name without prefix."""

    folder: Path
    base: str
    rank: int
    scale: float
    tensors: dict[str, tuple[Tensor, Tensor]]

    def lora(self, config: QwenVLConfig) -> LoRA:
        """Which of our kernels it adapts; those of a group together, the others' parts zero.

        Raises UserError for a module that is none of our kernels.
        """
        ours = {theirs: name for name, theirs in (MODULES | FAMILIES[config.architecture]).items()}
        paths = {module: ours.get(_kind(module)) for module in self.tensors}
        if strange := [module for module, path in paths.items() if path is None]:
            raise _unlike(self.folder, f"adapts {strange[0]}, which a {config.architecture} lacks")
        numbered = (
            re.sub(r"\b(layers|deepstack)\\\.", r"\1\\.\\d+\\.", re.escape(path))
            for path in sorted(set(paths.values()))
        )
        return LoRA(self.rank, float(self.rank), rf"^({'|'.join(numbered)})\.kernel$")

    def read(self, params: Any, config: QwenVLConfig) -> Any:
        """Our adapters, float32 on the host, as a tree to join with the base's parameters.

        params: the base's, nested dicts, abstract. Every kernel that fits `lora` gets a pair.
        Raises UserError where a matrix has no kernel, or another size than it.
        """
        left, adapters = dict(self.tensors), {}
        kinds = set(map(_kind, left))
        paths = [path for path, _ in jax.tree.leaves_with_path(params)]
        for target in targets(params, config):
            modules = [PREFIX.sub("", name).removesuffix(".weight") for name in target.names]
            if not target.kernel or _kind(modules[0]) not in kinds:
                continue
            inputs, *outputs = target.shape
            a = np.zeros((len(modules), inputs, self.rank), np.float32)
            b = np.zeros((len(modules), self.rank, *outputs), np.float32)
            for layer, module in enumerate(modules):
                if module in left:
                    sizes = inputs, math.prod(outputs)
                    a[layer], flat = self._matrices(module, *left.pop(module), *sizes)
                    b[layer] = flat.reshape(b.shape[1:])
            place = adapters
            for key in paths[target.index][:-1]:
                place = place.setdefault(key.key, {})
            place["lora_a"], place["lora_b"] = (a, b) if target.stacked else (a[0], b[0])
        if not config.tie_embeddings and "backbone" in params:
            left.pop(HEAD.removesuffix(".weight"), None)  # of an embedder, which has no head
        if left:
            raise _unlike(
                self.folder, f"adapts {sorted(left)[0]}, of which this model has no matrix alone"
            )
        return adapters

    def _matrices(
        self, module: str, a: Tensor, b: Tensor, inputs: int, outputs: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """A [D, r] and scaled B [r, O]; a convolution's are those of the product that it is."""
        sizes = a.shape[0], math.prod(a.shape[1:]), b.shape[0], math.prod(b.shape[1:])
        if sizes != (self.rank, inputs, outputs, self.rank):
            raise UserError(
                f"{self.folder}: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}; "
                f"expected [{self.rank}, {inputs}] and [{outputs}, {self.rank}]: name the base "
                f"that it was trained on in {CONFIG}"
            )
        first, second = (x.view().astype(np.float32).reshape(x.shape[0], -1) for x in (a, b))
        return first.T, np.float32(self.scale) * second.T


def _kind(module: str) -> str:
    """A module's name as MODULES has it, for all layers."""
    return re.sub(r"\.\d+\.", ".{}.", module)


def is_adapter(folder: Any) -> bool:
    return (folder / CONFIG).exists()


def read_adapter(folder: Path) -> Adapter:
    """Raises UserError where the folder is no adapter of plain LoRA, whole and readable."""
    if any((folder / name).exists() for name in (SINGLE, INDEX)):
        raise UserError(
            f"{folder} holds a whole model and a PEFT adapter ({CONFIG}); move one of them to a "
            "folder of its own, and name the one that you mean"
        )
    try:
        described = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind = described.get("peft_type")
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{folder / CONFIG} holds no JSON object; fetch it again") from None
    if kind != "LORA":
        raise _unlike(folder, f"is of peft_type {kind!r}")
    on = {name for name, value in described.items() if name not in PLAIN and value not in OFF}
    if described.get("bias") not in (None, "none"):
        on.add("bias")
    initial = described.get("init_lora_weights")
    if not isinstance(initial, bool) and initial not in INITIAL:
        on.add("init_lora_weights")
    if described.get("revision") not in (None, "main"):
        on.add("revision")
    if on:
        names = ", ".join(f"{name} {described[name]!r}"[:80] for name in sorted(on))
        raise _unlike(folder, f"says {names}")
    rank, alpha = described.get("r"), described.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise UserError(
            f"{folder / CONFIG}: r is {rank!r} and lora_alpha {alpha!r}; fetch it again"
        )
    base = described.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(
            f"{folder / CONFIG}: no base_model_name_or_path; say there which model the adapter was "
            "trained on, by its folder or its name on the hub"
        )
    scale = alpha / (math.sqrt(rank) if described.get("use_rslora") else rank)
    return Adapter(folder, base, rank, scale, _tensors(folder))


def _tensors(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    if not (folder / WEIGHTS).exists():
        raise UserError(
            f"{folder} is a PEFT adapter without {WEIGHTS}; a .bin is a pickle, which is never "
            "read: load it with PEFT and save it again (safe_serialization=True)"
        )
    sides: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    for name, tensor in read_header(folder / WEIGHTS).items():
        match = NAME.fullmatch(name)
        if not match:
            raise _unlike(folder, f"holds {name}")
        sides[match[2]][PREFIX.sub("", match[1])] = tensor
    if sides["A"].keys() != sides["B"].keys() or not sides["A"]:
        raise UserError(f"{folder / WEIGHTS}: not a lora_A and a lora_B each; fetch it again")
    return {module: (a, sides["B"][module]) for module, a in sides["A"].items()}


def _unlike(folder: Path, what: str) -> UserError:
    return UserError(
        f"{folder}: this PEFT adapter {what}, and only plain LoRA of a model's linear layers is "
        "read; merge it with PEFT (merge_and_unload, save_pretrained) and name that folder"
    )
