"""A model that exists already, wherever it lies: a run's workdir, one of its checkpoints, a Hugging
Face folder, an adapter's of PEFT, or a name on the hub. Evaluation, export and `init_from` all find
it here.

A checkpoint under LoRA, and PEFT's folder, hold adapters alone. They stand on a base, whose place
(and a run's fingerprint) is said beside them. The two are merged when the model is read, but where
other adapters are to be trained: then they stay apart, as part of the base.
"""

import dataclasses
import functools
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import jax
from etils import epath
from ml_collections import ConfigDict

from afmrl_jax.assembly.encoder import Encoder
from afmrl_jax.assembly.generator import Generator
from afmrl_jax.assembly.model import AnyAssembly, Assembly, abstract_params, lora_of
from afmrl_jax.checkpoints.checkpoint import Checkpoints, find_checkpoints
from afmrl_jax.checkpoints.integrity import is_bucket
from afmrl_jax.checkpoints.record import recorded
from afmrl_jax.core.errors import UserError
from afmrl_jax.data.prompts import chat_template, tell_system_words
from afmrl_jax.models import lora
from afmrl_jax.models.lora import LoRA
from afmrl_jax.models.presets import PRESETS, preset
from afmrl_jax.weights import hf_weights, peft_adapter

log = logging.getLogger(__name__)

# What an exported folder holds of its run: {"kind": encoder | generator, "config": the run's,
# "step": .., "evaluation": ..}.
RECORD = "afmrl_jax.json"


@dataclass(frozen=True)
class Pretrained(Generic[AnyAssembly]):
    """What is known of a model before its parameters are read."""

    enc: AnyAssembly  # its settings are those that trained it; None of a bare folder
    load: Callable[[Any], Any]  # abstract parameters, with their shardings -> parameters
    step: int | None
    evaluation: dict | None  # its run's evaluation.json, where that judged this step
    told: str  # how a report names it
    path: str  # where it is found again, though a workdir has got newer checkpoints
    lora: tuple[LoRA, ...] = ()  # the adapters among its parameters, from the first trained on

    def model(self, otherwise: ConfigDict) -> AnyAssembly:
        """The model used as its run did; where it has none, as `otherwise` says, a configuration
        with `model` and `data`."""
        if self.enc.settings is not None:
            return self.enc
        model = otherwise.model.to_dict() | {"remat": "none"}  # there is no backward pass
        settings = ConfigDict({"model": model, "data": otherwise.data.to_dict()})
        self.tell_system_words(settings)
        return dataclasses.replace(self.enc, settings=settings)

    def tell_system_words(self, settings: ConfigDict) -> None:
        """Logs what an encoder's rows begin with, where these settings leave it to the folder."""
        if isinstance(self.enc, Encoder):
            data = settings.data
            tell_system_words(self.path, data.prompt, self.enc.chat_template, data.instruction)

    def trained(self, settings: ConfigDict) -> AnyAssembly:
        """The model as a run of this configuration trains it, from these parameters on."""
        self.tell_system_words(settings)
        lora = lora_of(settings)
        base = self.lora if lora else ()
        return dataclasses.replace(self.enc, settings=settings, lora=lora, base_lora=base)


def find_pretrained(
    path: str, kind: type[AnyAssembly] = Encoder, *, best: bool | None = False, begin: bool = False
) -> Pretrained[AnyAssembly]:
    """The model that `path` names; best: as in `find_checkpoints`.

    kind: what to make of it. A run's checkpoint is that or an error; with `begin` an encoder, which
    has learnt to see, gives a generator its parameters. A folder may be either.
    Raises UserError, naming the file, where there is none or a part of it is missing or broken.
    """
    folder = _resolve(path)
    if not is_bucket(folder) and peft_adapter.is_adapter(folder):
        return _of_adapter(folder, path, kind)
    if _is_exported(folder):
        return _of_folder(folder, path, kind)
    checkpoints, step = find_checkpoints(path, best=best)
    record = checkpoints.record(step)
    found = record["kind"]
    settings = recorded(record["config"], path)
    enc = kind.from_record(settings, record)
    adapters = (*enc.base_lora, *filter(None, [lora_of(settings)]))
    enc = dataclasses.replace(enc, base_lora=())
    load = functools.partial(_load_run, checkpoints, step, record)
    if found == kind.kind:
        load = functools.partial(load, kind)
    elif begin and found == Encoder.kind and enc.model_config.tie_embeddings:
        load = functools.partial(_without_pooling, functools.partial(load, Encoder))
    else:  # an encoder whose head is not its embedding table has none
        raise UserError(f"{path} holds the {found} of a run: name what has trained the {kind.kind}")
    return Pretrained(
        enc,
        load,
        step,
        _evaluation(folder, step, settings),
        f"{path}, step {step}",
        str(checkpoints.folder / str(step)),
        adapters,
    )


def planned(settings: ConfigDict, name: str, kind: type[AnyAssembly] = Encoder) -> AnyAssembly:
    """A model of which only shapes matter: a preset, or anything that `find_pretrained` knows, or a
    folder with its config.json alone. Its settings are these, with LoRA as they say.

    Raises UserError where there is no such thing.
    """
    if name in PRESETS:
        found = kind(settings, preset(name), None)
    elif (Path(name) / "config.json").exists() and not any(
        (Path(name) / other).exists() for other in ("checkpoints", peft_adapter.CONFIG)
    ):
        found = kind.from_folder(settings, Path(name))
    else:
        return find_pretrained(name, kind).trained(settings)
    return dataclasses.replace(found, settings=settings, lora=lora_of(settings))


def _without_pooling(load: Callable[[Any], Any], abstract: Any) -> Any:
    """An encoder's parameters as a language model's."""
    return load({"backbone": abstract})["backbone"]


def kind_of(path: str, *, best: bool = False) -> type[Encoder] | type[Generator]:
    """What the model is that `path` names; a folder that knows no run counts as an encoder.

    best: as in `find_pretrained`, which raises the same errors.
    """
    folder = _resolve(path)
    if _is_exported(folder):
        record = _record_of(folder)
    else:
        checkpoints, step = find_checkpoints(path, best=best)
        record = checkpoints.record(step)
    return Generator if record and record["kind"] == Generator.kind else Encoder


def _resolve(path: str) -> Path | epath.Path:
    """The folder that `path` names; of buckets only checkpoints are read."""
    return epath.Path(path) if is_bucket(path) else hf_weights.resolve(path)


def _is_exported(folder: Path | epath.Path) -> bool:
    """Whether it holds a model, or PEFT's adapter, instead of a run's checkpoints."""
    return not is_bucket(folder) and (
        any(folder.glob("*.safetensors*")) or peft_adapter.is_adapter(folder)
    )


def _record_of(folder: Path) -> dict[str, Any] | None:
    """What an exported folder tells of its run; None of a bare folder."""
    file = folder / RECORD
    if not file.exists():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return {name: record[name] for name in ("kind", "config", "step", "evaluation")}
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{file} is no record of a run: export the folder again, or delete the file to use "
            "the folder as any other"
        ) from None


def _of_folder(folder: Path, path: str, kind: type[AnyAssembly]) -> Pretrained[AnyAssembly]:
    """A Hugging Face folder; one that was exported here knows its run, for what that trained."""
    record = _record_of(folder)
    settings, step, evaluation = None, None, None
    if record and record["kind"] == kind.kind:
        settings = recorded(record["config"], folder)
        step, evaluation = record["step"], record["evaluation"]
    enc = kind.from_folder(settings, folder)
    return Pretrained(
        enc,
        lambda abstract: hf_weights.load(folder, abstract, enc.model_config),
        step,
        evaluation,
        str(folder),
        path,
    )


def _of_adapter(folder: Path, path: str, kind: type[AnyAssembly]) -> Pretrained[AnyAssembly]:
    """PEFT's folder on the model that it names; its own chat template counts, if it has one."""
    adapter = peft_adapter.read_adapter(folder)
    try:
        base = hf_weights.resolve(adapter.base)
        if peft_adapter.is_adapter(base):
            raise UserError(f"{base} is an adapter itself")
        enc = kind.from_folder(None, base)
    except UserError as error:
        raise UserError(
            f"{folder} is a PEFT adapter, and the model that it stands on cannot be read. {error}. "
            f"Name that model, not quantised, as base_model_name_or_path in {peft_adapter.CONFIG}"
        ) from None
    enc = dataclasses.replace(enc, chat_template=chat_template(folder) or enc.chat_template)
    own = adapter.lora(enc.model_config)
    log.info("%s: a PEFT adapter of %d matrices on %s", folder, len(adapter.tensors), base)

    def load(abstract: Any) -> Any:
        plain = lora.plain(abstract)
        adapters = adapter.read(plain, enc.model_config)
        params = hf_weights.load(base, plain, enc.model_config)
        return _combined(lora.join(adapters, params), own.scale, abstract)

    return Pretrained(enc, load, None, None, str(folder), path, (own,))


def _combined(params: Any, scale: float, abstract: Any) -> Any:
    """Parameters with adapters as `abstract` says: merged in float32, or apart."""
    example = jax.tree.leaves(abstract)[0]
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    combine = lora.apart if lora.is_apart(abstract) else lora.merge
    return jax.jit(lambda params: combine(params, scale, example.dtype), out_shardings=shardings)(
        params
    )


def _evaluation(folder: Path | epath.Path, step: int, settings: ConfigDict) -> dict | None:
    """A run judges its test listings once, after the last step."""
    workdirs = (folder, folder.parent, folder.parent.parent)
    signs = ("checkpoints", "config.json")  # of a workdir: its checkpoints may lie elsewhere
    found = (path for path in workdirs if any((path / sign).exists() for sign in signs))
    file = next(found, folder) / "evaluation.json"
    if step != settings.steps or not file.exists():
        return None
    return json.loads(file.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Base:
    """What a run's adapters stand on: a Pretrained's path, or "" for parameters from the seed."""

    path: str
    fingerprint: str = ""  # "" = not read yet

    @staticmethod
    def of_record(record: dict[str, str]) -> "Base":
        return Base(**json.loads(record["base"]))

    def record(self) -> dict[str, str]:
        """What a run's record holds of it."""
        return {"base": json.dumps(dataclasses.asdict(self))}


def read_base(enc: Assembly, frozen: Any, base: Base) -> tuple[Any, Base]:
    """The parameters that `frozen` describes, with shardings, and their base with its fingerprint.

    Raises UserError where it is gone, or is another than the fingerprint says.
    """
    if base.path:
        try:
            params = find_pretrained(base.path, type(enc), begin=True).load(frozen)
        except UserError as error:
            raise UserError(
                f"the model that this run stands on cannot be read. {error}. Bring {base.path} "
                "back as it was, or leave a link there to where it is now"
            ) from None
    else:
        shardings = jax.tree.map(lambda x: x.sharding, frozen)
        fresh = functools.partial(enc.init_params, enc.settings.seed)
        params = jax.jit(lambda: lora.split(fresh())[1], out_shardings=shardings)()
    found = lora.fingerprint(params)
    if base.fingerprint not in ("", found):
        raise UserError(
            f"{base.path or 'this seed'} gives other parameters than those that this run stands "
            "on: bring the model back as it was (or, of a seed, JAX's version and the kind "
            "of device), or start anew with another --workdir"
        )
    return params, Base(base.path, found)


def _load_run(
    checkpoints: Checkpoints, step: int, record: dict[str, str], kind: type[Assembly], abstract: Any
) -> Any:
    """A checkpoint's parameters as `abstract` says; adapters are merged in float32, or apart."""
    settings = recorded(record["config"], checkpoints.folder)
    adapted = lora_of(settings)
    if not adapted:
        return checkpoints.restore_params(step, abstract)
    enc = dataclasses.replace(kind.from_record(settings, record), lora=adapted)
    example = jax.tree.leaves(abstract)[0]
    trained, frozen = lora.split(abstract_params(enc, example.sharding.mesh))
    frozen, _ = read_base(enc, frozen, Base.of_record(record))
    params = lora.join(checkpoints.restore_params(step, trained), frozen)
    return _combined(params, adapted.scale, abstract)
