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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import jax
from etils import epath

from afmrl_jax.assembly.encoder import Encoder
from afmrl_jax.assembly.generator import Generator
from afmrl_jax.assembly.model import AnyAssembly, AnyOptions, Assembly, abstract_params
from afmrl_jax.assembly.options import EncoderOptions, TrainingOptions
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

    model: AnyAssembly  # its options are its run's; None of a bare folder
    load: Callable[[Any], Any]  # abstract parameters, with their shardings -> parameters
    label: str  # how a report names it
    path: str  # where it is found again, though a workdir has got newer checkpoints
    lora: tuple[LoRA, ...] = ()  # the adapters among its parameters, from the first trained on
    step: int | None = None
    config: Mapping[str, Any] | None = None  # of its run, as its record has it
    evaluation: dict | None = None  # its run's evaluation.json, where that judged this step

    def with_options(self, options: AnyOptions | None) -> AnyAssembly:
        """The model as its run used it; with these options where it has no run."""
        if self.model.options is not None:
            return self.model
        self._tell_system_words(options)
        return dataclasses.replace(self.model, options=options)

    def for_training(self, options: AnyOptions, training: TrainingOptions) -> AnyAssembly:
        """The model as a run trains it, from these parameters on."""
        self._tell_system_words(options)
        base = self.lora if training.lora else ()
        model = dataclasses.replace(self.model, options=options, base_lora=base)
        return model.for_training(training)

    def _tell_system_words(self, options: AnyOptions) -> None:
        """Logs what an encoder's rows begin with, where the options leave it to the folder."""
        if isinstance(options, EncoderOptions):
            rows, template = options.rows, self.model.chat_template
            tell_system_words(self.path, rows.prompt, template, rows.instruction)


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
    config = recorded(record["config"], path)
    # An encoder's run does not say how a generator is asked.
    options = kind.options_type.of(config) if found == kind.kind else None
    model = kind.from_record(options, record)
    adapters = (*model.base_lora, *filter(None, [TrainingOptions.of(config).lora]))
    model = dataclasses.replace(model, base_lora=())
    load = functools.partial(_load_run, checkpoints, step, record)
    if found == kind.kind:
        load = functools.partial(load, kind)
    elif begin and found == Encoder.kind and model.model_config.tie_embeddings:
        load = functools.partial(_without_pooling, functools.partial(load, Encoder))
    else:  # an encoder whose head is not its embedding table has none
        raise UserError(f"{path} holds the {found} of a run: name what has trained the {kind.kind}")
    return Pretrained(
        model,
        load,
        f"{path}, step {step}",
        str(checkpoints.folder / str(step)),
        adapters,
        step=step,
        config=json.loads(record["config"]),
        evaluation=_evaluation(folder, step, config.steps),
    )


def planned(
    name: str, kind: type[AnyAssembly], options: AnyOptions, training: TrainingOptions
) -> AnyAssembly:
    """A model of which only shapes matter: a preset, or anything that `find_pretrained` knows, or a
    folder with its config.json alone.

    Raises UserError where there is no such thing.
    """
    if name in PRESETS:
        model = kind(options, preset(name), None)
    elif (Path(name) / "config.json").exists() and not any(
        (Path(name) / other).exists() for other in ("checkpoints", peft_adapter.CONFIG)
    ):
        model = kind.from_folder(options, Path(name))
    else:
        return find_pretrained(name, kind).for_training(options, training)
    return model.for_training(training)


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
    options, known = None, {}
    if record and record["kind"] == kind.kind:
        options = kind.options_type.of(recorded(record["config"], folder))
        known = {name: record[name] for name in ("step", "config", "evaluation")}
    model = kind.from_folder(options, folder)
    return Pretrained(
        model,
        lambda abstract: hf_weights.load(folder, abstract, model.model_config),
        str(folder),
        path,
        **known,
    )


def _of_adapter(folder: Path, path: str, kind: type[AnyAssembly]) -> Pretrained[AnyAssembly]:
    """PEFT's folder on the model that it names; its own chat template counts, if it has one."""
    adapter = peft_adapter.read_adapter(folder)
    try:
        base = hf_weights.resolve(adapter.base)
        if peft_adapter.is_adapter(base):
            raise UserError(f"{base} is an adapter itself")
        model = kind.from_folder(None, base)
    except UserError as error:
        raise UserError(
            f"{folder} is a PEFT adapter, and the model that it stands on cannot be read. {error}. "
            f"Name that model, not quantised, as base_model_name_or_path in {peft_adapter.CONFIG}"
        ) from None
    template = chat_template(folder) or model.chat_template
    model = dataclasses.replace(model, chat_template=template)
    own = adapter.lora(model.model_config)
    log.info("%s: a PEFT adapter of %d matrices on %s", folder, len(adapter.tensors), base)

    def load(abstract: Any) -> Any:
        plain = lora.plain(abstract)
        adapters = adapter.read(plain, model.model_config)
        params = hf_weights.load(base, plain, model.model_config)
        return _combined(lora.join(adapters, params), own.scale, abstract)

    return Pretrained(model, load, str(folder), path, (own,))


def _combined(params: Any, scale: float, abstract: Any) -> Any:
    """Parameters with adapters as `abstract` says: merged in float32, or apart."""
    example = jax.tree.leaves(abstract)[0]
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    combine = lora.apart if lora.is_apart(abstract) else lora.merge
    return jax.jit(lambda params: combine(params, scale, example.dtype), out_shardings=shardings)(
        params
    )


def _evaluation(folder: Path | epath.Path, step: int, steps: int) -> dict | None:
    """A run judges its test listings once, after the last step."""
    workdirs = (folder, folder.parent, folder.parent.parent)
    signs = ("checkpoints", "config.json")  # of a workdir: its checkpoints may lie elsewhere
    found = (path for path in workdirs if any((path / sign).exists() for sign in signs))
    file = next(found, folder) / "evaluation.json"
    if step != steps or not file.exists():
        return None
    return json.loads(file.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Base:
    """What a run's adapters stand on: a Pretrained's path, or "" for parameters from the seed."""

    path: str
    fingerprint: str = ""  # "" = not read yet
    seed: int = 0

    @staticmethod
    def of_record(record: dict[str, str]) -> "Base":
        return Base(**json.loads(record["base"]))

    def record(self) -> dict[str, str]:
        """What a run's record holds of it."""
        return {"base": json.dumps(dataclasses.asdict(self))}


def read_base(model: Assembly, frozen: Any, base: Base) -> tuple[Any, Base]:
    """The parameters that `frozen` describes, with shardings, and their base with its fingerprint.

    Raises UserError where it is gone, or is another than the fingerprint says.
    """
    if base.path:
        try:
            params = find_pretrained(base.path, type(model), begin=True).load(frozen)
        except UserError as error:
            raise UserError(
                f"the model that this run stands on cannot be read. {error}. Bring {base.path} "
                "back as it was, or leave a link there to where it is now"
            ) from None
    else:
        shardings = jax.tree.map(lambda x: x.sharding, frozen)
        fresh = functools.partial(model.init_params, base.seed)
        params = jax.jit(lambda: lora.without(fresh()), out_shardings=shardings)()
    found = lora.fingerprint(params)
    if base.fingerprint not in ("", found):
        raise UserError(
            f"{base.path or 'this seed'} gives other parameters than those that this run stands "
            "on: bring the model back as it was (or, of a seed, JAX's version and the kind "
            "of device), or start anew with another --workdir"
        )
    return params, dataclasses.replace(base, fingerprint=found)


def _load_run(
    checkpoints: Checkpoints, step: int, record: dict[str, str], kind: type[Assembly], abstract: Any
) -> Any:
    """A checkpoint's parameters as `abstract` says; adapters are merged in float32, or apart."""
    config, trainable = recorded(record["config"], checkpoints.folder), record.get("trainable", "")
    training = TrainingOptions.of(config)
    if not training.lora and not trainable:
        return checkpoints.restore_params(step, abstract)
    model = kind.from_record(kind.options_type.of(config), record).for_training(training)
    example = jax.tree.leaves(abstract)[0]
    whole = abstract_params(model, example.sharding.mesh)
    trained, frozen = lora.split(whole, trainable)
    params, _ = read_base(model, lora.without(whole), Base.of_record(record))
    trained = checkpoints.restore_params(step, trained)
    params = lora.join(trained, lora.subset(params, frozen))
    return _combined(params, training.lora.scale if training.lora else 1.0, abstract)
