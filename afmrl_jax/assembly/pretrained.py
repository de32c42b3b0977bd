"""Finds models: in a run's workdir, one of its checkpoints, a Hugging Face folder, a PEFT adapter's
folder, by a name on the hub, or `base`, the model that ships with the package. Evaluation, export
and `init_from` all use it.

A checkpoint of a LoRA run, and PEFT's folder, hold adapters alone, and name the base model that
they adapt (a run records the base's fingerprint, too). Reading the model merges adapters and base,
unless other adapters are to be trained: then they stay apart, as part of the frozen base.
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
from afmrl_jax.checkpoints.record import recorded, sections
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.types import Params
from afmrl_jax.data.prompts import chat_template, tell_system_words
from afmrl_jax.models import lora
from afmrl_jax.models.lora import LoRA
from afmrl_jax.models.presets import PRESETS, preset
from afmrl_jax.weights import hf_weights, peft_adapter

log = logging.getLogger(__name__)

# The file of an exported folder about its run: {"kind": encoder | generator, "config": the run's,
# "step": .., "evaluation": ..}.
RECORD = "afmrl_jax.json"
BASE = "base"  # names the folder that ships with the package, whatever lies in the current one
BASE_FOLDER = Path(__file__).parents[1] / "assets" / BASE


@dataclass(frozen=True)
class Pretrained(Generic[AnyAssembly]):
    """A model whose parameters are not read yet."""

    model: AnyAssembly  # with the options of its run; with None from a folder without a run
    load: Callable[[Params], Params]  # abstract parameters, with their shardings -> parameters
    label: str  # name in reports
    path: str  # names this very model, also once its workdir has newer checkpoints
    lora: tuple[LoRA, ...] = ()  # adapters among its parameters, in the order of their training
    step: int | None = None
    config: Mapping[str, Any] | None = None  # of its run, from the record
    evaluation: dict | None = None  # its run's evaluation.json, where it is of this step

    def with_options(self, options: AnyOptions | None) -> AnyAssembly:
        """The model with the options of its run; with `options` where it has no run."""
        if self.model.options is not None:
            return self.model
        self._log_system_words(options)
        return dataclasses.replace(self.model, options=options)

    def for_training(self, options: AnyOptions, training: TrainingOptions) -> AnyAssembly:
        """The model of a run that trains it further."""
        self._log_system_words(options)
        base = self.lora if training.lora else ()
        model = dataclasses.replace(self.model, options=options, base_lora=base)
        return model.for_training(training)

    def _log_system_words(self, options: AnyOptions) -> None:
        """Logs the system message of an encoder's rows, where the folder's template sets it."""
        if isinstance(options, EncoderOptions):
            rows, template = options.rows, self.model.chat_template
            tell_system_words(self.path, rows.prompt, template, rows.instruction)


def find_pretrained(
    path: str,
    model_class: type[AnyAssembly] = Encoder,
    *,
    best: bool | None = False,
    begin: bool = False,
) -> Pretrained[AnyAssembly]:
    """The model that `path` names, as a model_class. best: as in `find_checkpoints`.

    A run's checkpoint must be of that class; with `begin` it may be of the other one too, whose
    language model is taken. A folder may be read as either.
    Raises UserError, naming the file, where there is no model, or a part is missing or broken.
    """
    if path == BASE and Path(BASE).exists():
        log.warning("base names the model that ships with the package; ./base is the folder here")
    folder = _resolve(path)
    if not is_bucket(folder) and peft_adapter.is_adapter(folder):
        return _of_adapter(folder, path, model_class)
    if _is_exported(folder):
        return _of_folder(folder, path, model_class)
    checkpoints, step = find_checkpoints(path, best=best)
    record = checkpoints.record(step)
    kind = record["kind"]
    config = recorded(record["config"], path)
    # An encoder's run has no options of a generator, nor a generator's of an encoder.
    options = model_class.options_type.of(config) if kind == model_class.kind else None
    model = model_class.from_record(options, record)
    adapters = (*model.base_lora, *filter(None, [TrainingOptions.of(config).lora]))
    model = dataclasses.replace(model, base_lora=())
    trained_class = next(kind_of for kind_of in (Encoder, Generator) if kind_of.kind == kind)
    load = functools.partial(_load_run, checkpoints, step, record, trained_class)
    if kind != model_class.kind:
        # An encoder whose head is not its embedding table has none.
        if not begin or (model_class is Generator and not model.model_config.tie_embeddings):
            raise UserError(
                f"{path} holds the {kind} of a run: name what has trained the {model_class.kind}"
            )
        load = functools.partial(_of_the_other, load, trained_class)
    return Pretrained(
        model,
        load,
        f"{path}, step {step}",
        str(checkpoints.folder / str(step)),
        adapters,
        step=step,
        config=config,
        evaluation=_evaluation(folder, step, config["steps"]),
    )


def planned(
    name: str, model_class: type[AnyAssembly], options: AnyOptions, training: TrainingOptions
) -> AnyAssembly:
    """A model for planning, which needs shapes alone: a preset, a model that `find_pretrained`
    finds, or a folder with nothing but a config.json.

    Raises UserError where there is none of these.
    """
    folder = BASE_FOLDER if name == BASE else Path(name)
    if name in PRESETS:
        model = model_class(options, preset(name), None)
    elif (folder / "config.json").exists() and not any(
        (folder / other).exists() for other in ("checkpoints", peft_adapter.CONFIG)
    ):
        model = model_class.from_folder(options, folder)
    else:
        return find_pretrained(name, model_class).for_training(options, training)
    return model.for_training(training)


def _of_the_other(
    load: Callable[[Params], Params], trained: type[Assembly], abstract: Params
) -> Params:
    """A generator's parameters from those of an encoder, or the other way round; trained: which of
    the two `load` reads. An encoder is a language model below its pooling."""
    if trained is Encoder:
        return load({"backbone": abstract})["backbone"]
    return {"backbone": load(abstract["backbone"])}


def model_class_of(path: str, *, best: bool = False) -> type[Encoder] | type[Generator]:
    """The class of the model that `path` names; a folder without a run counts as an encoder.

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
    if path == BASE:
        return BASE_FOLDER
    return epath.Path(path) if is_bucket(path) else hf_weights.resolve(path)


def _is_exported(folder: Path | epath.Path) -> bool:
    """Whether the folder holds a model or PEFT's adapter, and not a run's checkpoints."""
    return not is_bucket(folder) and (
        any(folder.glob("*.safetensors*")) or peft_adapter.is_adapter(folder)
    )


def _record_of(folder: Path) -> dict[str, Any] | None:
    """The record of its run in an exported folder; None where there is none."""
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


def _of_folder(folder: Path, path: str, model_class: type[AnyAssembly]) -> Pretrained[AnyAssembly]:
    """The model of a Hugging Face folder. A folder that this project exported has a record of its
    run, which counts where the run trained a model_class."""
    record = _record_of(folder)
    options, run_fields = None, {}
    if record and record["kind"] == model_class.kind:
        # Its model's settings alone: a folder outlives the other fields of the page that made it.
        options = model_class.options_type.of(sections(record["config"], folder))
        run_fields = {name: record[name] for name in ("step", "config", "evaluation")}
    model = model_class.from_folder(options, folder)
    return Pretrained(
        model,
        lambda abstract: hf_weights.load(folder, abstract, model.model_config),
        str(folder),
        path,
        **run_fields,
    )


def _of_adapter(folder: Path, path: str, model_class: type[AnyAssembly]) -> Pretrained[AnyAssembly]:
    """PEFT's adapter on the model that it names; a chat template in the adapter's folder counts."""
    adapter = peft_adapter.read_adapter(folder)
    try:
        base = hf_weights.resolve(adapter.base)
        if peft_adapter.is_adapter(base):
            raise UserError(f"{base} is an adapter itself")
        model = model_class.from_folder(None, base)
    except UserError as error:
        raise UserError(
            f"{folder} is a PEFT adapter, and the model that it stands on cannot be read. {error}. "
            f"Name that model, not quantised, as base_model_name_or_path in {peft_adapter.CONFIG}"
        ) from None
    template = chat_template(folder) or model.chat_template
    model = dataclasses.replace(model, chat_template=template)
    adapters = adapter.lora(model.model_config)
    log.info("%s: a PEFT adapter of %d matrices on %s", folder, len(adapter.tensors), base)

    def load(abstract: Params) -> Params:
        plain = lora.without_any_adapters(abstract)
        trained = adapter.read(plain, model.model_config)
        params = hf_weights.load(base, plain, model.model_config)
        return _combined(lora.join(trained, params), adapters.scale, abstract)

    return Pretrained(model, load, str(folder), path, (adapters,))


def _combined(params: Params, scale: float, abstract: Params) -> Params:
    """Parameters with their adapters merged in float32, or apart where `abstract` has adapters."""
    example = jax.tree.leaves(abstract)[0]
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    combine = lora.as_base_adapters if lora.has_base_adapters(abstract) else lora.merge
    return jax.jit(lambda params: combine(params, scale, example.dtype), out_shardings=shardings)(
        params
    )


def _evaluation(folder: Path | epath.Path, step: int, steps: int) -> dict | None:
    """The evaluation.json of a run, which is of its last step; None for an earlier step."""
    folders = (folder, folder.parent, folder.parent.parent)
    signs = ("checkpoints", "config.json")  # of a workdir: its checkpoints may lie elsewhere
    workdirs = (path for path in folders if any((path / sign).exists() for sign in signs))
    file = next(workdirs, folder) / "evaluation.json"
    if step != steps or not file.exists():
        return None
    return json.loads(file.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Base:
    """The frozen model below a run's adapters. path: of a Pretrained, or "" for parameters that the
    seed initialises."""

    path: str
    fingerprint: str = ""  # "" = not read yet
    seed: int = 0

    @staticmethod
    def of_record(record: dict[str, str]) -> "Base":
        return Base(**json.loads(record["base"]))

    def record(self) -> dict[str, str]:
        """The base as a run records it."""
        return {"base": json.dumps(dataclasses.asdict(self))}


def read_base(model: Assembly, frozen: Params, base: Base) -> tuple[Params, Base]:
    """The parameters of the base, and the base with its fingerprint.

    frozen: abstract, with shardings. Raises UserError where the base cannot be read, or has
    another fingerprint than recorded.
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
        params = jax.jit(lambda: lora.without_adapters(fresh()), out_shardings=shardings)()
    fingerprint = lora.fingerprint(params)
    if base.fingerprint not in ("", fingerprint):
        raise UserError(
            f"{base.path or 'this seed'} gives other parameters than those that this run stands "
            "on: bring the model back as it was (or, of a seed, JAX's version and the kind "
            "of device), or start anew with another --workdir"
        )
    return params, dataclasses.replace(base, fingerprint=fingerprint)


def _load_run(
    checkpoints: Checkpoints,
    step: int,
    record: dict[str, str],
    model_class: type[Assembly],
    abstract: Params,
) -> Params:
    """The parameters of a checkpoint; adapters are merged in float32, or apart where `abstract` has
    adapters."""
    config, trainable = recorded(record["config"], checkpoints.folder), record.get("trainable", "")
    training = TrainingOptions.of(config)
    if not training.lora and not trainable:
        return checkpoints.restore_params(step, abstract)
    options = model_class.options_type.of(config)
    model = model_class.from_record(options, record).for_training(training)
    example = jax.tree.leaves(abstract)[0]
    whole = abstract_params(model, example.sharding.mesh)
    trained, frozen = lora.split(whole, trainable)
    params, _ = read_base(model, lora.without_adapters(whole), Base.of_record(record))
    trained = checkpoints.restore_params(step, trained)
    params = lora.join(trained, lora.subset(params, frozen))
    params = {name: params[name] for name in abstract}  # an encoder takes no generator's head
    return _combined(params, training.lora.scale if training.lora else 1.0, abstract)
