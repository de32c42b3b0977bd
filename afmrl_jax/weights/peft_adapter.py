"""Reads an adapter folder of PEFT: LoRA's matrices, without the base model's weights.

PEFT (https://github.com/huggingface/peft) computes W + alpha / r B A for each adapted weight W
(alpha / sqrt(r) with rsLoRA). Its matrices are A [r, I] and B [O, r]; ours are A [I, r] and
B [r, *O], with the scale within B. Anything else that PEFT can train is refused, because its
numbers would be missing from the model.
Axes: I inputs · r rank · O outputs, of one or two axes.
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
# The fields of adapter_config.json that plain LoRA may set; any other must be off.
PLAIN = (
    *("r", "lora_alpha", "use_rslora", "base_model_name_or_path", "revision", "peft_type"),
    *("task_type", "auto_mapping", "inference_mode", "lora_dropout", "peft_version"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("init_lora_weights", "bias", "megatron_core", "qalora_group_size", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config"),  # options of the initial values
)
OFF = (None, False, "", [], {})
# Values of init_lora_weights, beside True and False, that leave the base's weights as they are.
# Others subtract from them, and the saved matrices stand on the difference.
INITIAL = (None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Adapter:
    """An adapter folder. tensors: (A, B) by the name of their module, without prefix."""

    folder: Path
    base: str  # folder or name on the hub of the model that it was trained on
    rank: int
    scale: float
    tensors: dict[str, tuple[Tensor, Tensor]]

    def lora(self, config: QwenVLConfig) -> LoRA:
        """The LoRA that adapts the same kernels. A kernel of stacked layers is adapted as a whole;
        layers without an adapter get zeros.

        Raises UserError for a module that is none of our kernels.
        """
        modules = MODULES | FAMILIES[config.architecture]
        our_names = {hf_name: name for name, hf_name in modules.items()}
        paths = {module: our_names.get(_pattern(module)) for module in self.tensors}
        if strange := [module for module, path in paths.items() if path is None]:
            raise _not_plain(
                self.folder, f"adapts {strange[0]}, which a {config.architecture} lacks"
            )
        numbered = (
            re.sub(r"\b(layers|deepstack)\\\.", r"\1\\.\\d+\\.", re.escape(path))
            for path in sorted(set(paths.values()))
        )
        return LoRA(self.rank, float(self.rank), rf"^({'|'.join(numbered)})\.kernel$")

    def read(self, params: Any, config: QwenVLConfig) -> Any:
        """Our adapters, float32 on the host, as a tree to join with the base's parameters.

        params: the base's, nested dicts, abstract. Every kernel that `lora` targets gets a pair.
        Raises UserError where a matrix has no kernel, or does not fit its kernel's size.
        """
        unread, adapters = dict(self.tensors), {}
        patterns = set(map(_pattern, unread))
        paths = [path for path, _ in jax.tree.leaves_with_path(params)]
        for target in targets(params, config):
            modules = [PREFIX.sub("", name).removesuffix(".weight") for name in target.names]
            if not target.kernel or _pattern(modules[0]) not in patterns:
                continue
            inputs, *outputs = target.shape
            a = np.zeros((len(modules), inputs, self.rank), np.float32)
            b = np.zeros((len(modules), self.rank, *outputs), np.float32)
            for layer, module in enumerate(modules):
                if module in unread:
                    sizes = inputs, math.prod(outputs)
                    a[layer], flat = self._matrices(module, *unread.pop(module), *sizes)
                    b[layer] = flat.reshape(b.shape[1:])
            branch = adapters
            for key in paths[target.index][:-1]:
                branch = branch.setdefault(key.key, {})
            branch["lora_a"], branch["lora_b"] = (a, b) if target.stacked else (a[0], b[0])
        if not config.tie_embeddings and "backbone" in params:
            unread.pop(HEAD.removesuffix(".weight"), None)  # an embedder has no head
        if unread:
            raise _not_plain(
                self.folder, f"adapts {sorted(unread)[0]}, of which this model has no matrix alone"
            )
        return adapters

    def _matrices(
        self, module: str, a: Tensor, b: Tensor, inputs: int, outputs: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """A [I, r] and scaled B [r, O]; a convolution's are flattened to matrices."""
        sizes = a.shape[0], math.prod(a.shape[1:]), b.shape[0], math.prod(b.shape[1:])
        if sizes != (self.rank, inputs, outputs, self.rank):
            raise UserError(
                f"{self.folder}: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}; "
                f"expected [{self.rank}, {inputs}] and [{outputs}, {self.rank}]: name the base "
                f"that it was trained on in {CONFIG}"
            )
        first, second = (x.view().astype(np.float32).reshape(x.shape[0], -1) for x in (a, b))
        return first.T, np.float32(self.scale) * second.T


def _pattern(module: str) -> str:
    """A module's name with {} for the layer's number, as in MODULES."""
    return re.sub(r"\.\d+\.", ".{}.", module)


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).exists()


def read_adapter(folder: Path) -> Adapter:
    """Raises UserError where the folder is no adapter of plain LoRA, whole and readable."""
    if any((folder / name).exists() for name in (SINGLE, INDEX)):
        raise UserError(
            f"{folder} holds a whole model and a PEFT adapter ({CONFIG}); move one of them to a "
            "folder of its own, and name the one that you mean"
        )
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        peft_type = settings.get("peft_type")
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{folder / CONFIG} holds no JSON object; fetch it again") from None
    if peft_type != "LORA":
        raise _not_plain(folder, f"is of peft_type {peft_type!r}")
    refused = {name for name, value in settings.items() if name not in PLAIN and value not in OFF}
    if settings.get("bias") not in (None, "none"):
        refused.add("bias")
    initial = settings.get("init_lora_weights")
    if not isinstance(initial, bool) and initial not in INITIAL:
        refused.add("init_lora_weights")
    if settings.get("revision") not in (None, "main"):
        refused.add("revision")
    if refused:
        names = ", ".join(f"{name} {settings[name]!r}"[:80] for name in sorted(refused))
        raise _not_plain(folder, f"says {names}")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise UserError(
            f"{folder / CONFIG}: r is {rank!r} and lora_alpha {alpha!r}; fetch it again"
        )
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(
            f"{folder / CONFIG}: no base_model_name_or_path; say there which model the adapter was "
            "trained on, by its folder or its name on the hub"
        )
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
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
            raise _not_plain(folder, f"holds {name}")
        sides[match[2]][PREFIX.sub("", match[1])] = tensor
    if sides["A"].keys() != sides["B"].keys() or not sides["A"]:
        raise UserError(f"{folder / WEIGHTS}: not a lora_A and a lora_B each; fetch it again")
    return {module: (a, sides["B"][module]) for module, a in sides["A"].items()}


def _not_plain(folder: Path, problem: str) -> UserError:
    return UserError(
        f"{folder}: this PEFT adapter {problem}, and only plain LoRA of a model's linear layers is "
        "read; merge it with PEFT (merge_and_unload, save_pretrained) and name that folder"
    )
