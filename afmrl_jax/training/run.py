"""A training run in its workdir: what it began with, and what it goes on from."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh

from afmrl_jax.assembly.model import AnyAssembly, AnyOptions, Assembly
from afmrl_jax.assembly.options import PresetOptions, TrainingOptions
from afmrl_jax.assembly.pretrained import Base, Pretrained, find_pretrained, read_base
from afmrl_jax.catalog.listings import Catalog
from afmrl_jax.catalog.opening import CatalogOptions, open_catalogue
from afmrl_jax.checkpoints.checkpoint import Checkpoints, checkpoint_folder
from afmrl_jax.checkpoints.record import MAY_CHANGE, check_catalogue, check_unchanged
from afmrl_jax.checkpoints.state import TrainState, zeros
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.files import write_atomically
from afmrl_jax.core.options import Options
from afmrl_jax.data.stream import StreamOptions
from afmrl_jax.models import lora
from afmrl_jax.training.goodput import Clock
from afmrl_jax.training.schedule import Schedule
from afmrl_jax.training.step import Params, TrainStep
from afmrl_jax.training.tracing import traced_steps

TOKENIZER_LISTINGS = 20_000  # training listings whose texts a preset's tokenizer is trained on


@dataclass(frozen=True)
class Beginning(Options, section=""):
    """What a run begins with."""

    init_from: str  # a run, a Hugging Face folder, or "base"; "" = from scratch


@dataclass(frozen=True)
class ModelOptions(Options):
    """The model that a run trains, and with which it begins."""

    beginning: Beginning
    preset: PresetOptions
    training: TrainingOptions


@dataclass(frozen=True)
class RunOptions(Options):
    """What the runs of all programs have in common."""

    schedule: Schedule
    stream: StreamOptions


class Run:
    """A run of a training program, as a context that ends when its checkpoints are written.

    How it begins:
    1. The newest whole checkpoint of its folder, where there is one: model, tokenizer and base are
       those of its record, and the logs are cut back to its step. The configuration and the
       catalogue must be those of the record; what MAY_CHANGE names may differ.
    2. Otherwise the model that `init_from` names, at step 0.
    3. Otherwise a preset with parameters from the seed, at step 0.
    4. Where parameters are frozen, 2 and 3 name the base. It is read at each start and must have
       the fingerprint of the first one.
    5. After the last step nothing is trained: what is missing of the evaluation is made.

    config: JSON, as the record will hold it. saved: the record of the checkpoint that the run goes
    on from; None in a new run. record: what the next checkpoints hold beside the state.
    """

    def __init__(
        self,
        options: RunOptions,
        config: str,
        workdir: Path,
        mesh: Mesh,
        may_change: tuple[str, ...] = MAY_CHANGE,
    ):
        """options: read from the whole configuration, of which `config` is the JSON. may_change:
        beginnings of fields that may differ from a resumed run's.

        Raises UserError where the run began with another configuration, naming the fields, and
        where it does not have the steps that are to be traced.
        """
        self.config, self.workdir, self.mesh = config, workdir, mesh
        self.schedule, self.stream = options.schedule, options.stream
        traced_steps(self.schedule.profile, self.schedule.steps)
        self.clock = Clock(workdir / "goodput.json")
        self.first_process = jax.process_index() == 0
        self.record: dict[str, str] = {}
        self._catalog: Catalog | None = None
        folder = checkpoint_folder(self.schedule.checkpoint_dir, workdir)
        self.checkpoints = Checkpoints(folder, writable=True)
        latest = self.checkpoints.latest
        self.saved = self.checkpoints.record(latest) if latest else None
        if self.saved:
            check_unchanged(self.saved["config"], config, workdir, may_change)

    def __enter__(self) -> Self:
        self.checkpoints.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.checkpoints.__exit__(*error)

    def open_catalogue(
        self, options: CatalogOptions, view: Callable[[Catalog], Catalog] | None = None
    ) -> Catalog:
        """The catalogue that the options name, seen through `view`.

        Raises UserError where it is not the one that the run began with.
        """
        catalog = open_catalogue(options, self.workdir)
        self._catalog = catalog = view(catalog) if view else catalog
        if self.saved:
            check_catalogue(self.saved, catalog.fingerprint, options.path, self.workdir)
        return catalog

    def model(
        self,
        kind: type[AnyAssembly],
        options: AnyOptions,
        trained: ModelOptions,
        texts: Iterable[str],
    ) -> tuple[AnyAssembly, Pretrained[AnyAssembly] | None]:
        """The model, and where a new run's parameters lie: None for those of the seed.

        texts: what the tokenizer of a preset is trained on; read only where there is need.
        """
        if self.saved:
            saved = kind.from_record(options, self.saved)
            return saved.for_training(trained.training), None
        if path := trained.beginning.init_from:
            source = find_pretrained(path, kind, begin=True)
            return source.for_training(options, trained.training), source
        fresh = kind.from_preset(options, trained.preset, texts)
        return fresh.for_training(trained.training), None

    def keep(self, model: Assembly, **more: str) -> None:
        """Makes the record, and writes config.json and tokenizer.json. more: further parts."""
        self.record = model.record() | more | {"config": self.config}
        self.record["catalogue"] = self._catalog.fingerprint
        if self.first_process:
            config = json.dumps(json.loads(self.config), indent=2)
            write_atomically(self.workdir / "config.json", config)
            write_atomically(self.workdir / "tokenizer.json", self.record["tokenizer"])

    def start(
        self,
        step: TrainStep,
        model: Assembly,
        source: Pretrained | None,
        trainable: str = "",
    ) -> tuple[TrainState, Params]:
        """The state to go on from, and the frozen parameters beside it.

        trainable: the pattern of the parameters that are trained, which the record must tell.
        """
        heads, params, frozen = step.heads, None, {}
        trained = {n: part for n, part in step.abstract.params.items() if n not in heads}
        if step.frozen:
            base = Base(source.path if source else "", seed=self.schedule.seed)
            base = Base.of_record(self.saved) if self.saved else base
            whole = lora.without_adapters(lora.join(trained, step.frozen))
            params, base = read_base(model, whole, base)
            frozen = lora.subset(params, step.frozen)
            self.record |= base.record() | ({"trainable": trainable} if trainable else {})
        if self.saved:
            return self.restore(step), frozen
        if step.frozen and not model.lora:
            params = lora.subset(params, trained)
        elif source and not step.frozen:
            params = source.load(trained)
        else:
            seed = self.schedule.seed
            return step.initial(lambda: fresh_params(model, seed) | zeros(heads)), frozen
        return step.initial(params | zeros(heads)), frozen

    def restore(self, step: TrainStep) -> TrainState:
        """The newest checkpoint's state."""
        return self.checkpoints.restore(self.checkpoints.latest, step.abstract)

    def name_listings(self, listings: np.ndarray) -> list[str]:
        """The ids of a batch's listings, int[N] indices."""
        return [self._catalog.listing(int(index)).listing_id for index in listings]


def fresh_params(model: Assembly, seed: int) -> Params:
    """The parameters of the seed that are trained: adapters alone under LoRA."""
    return lora.split(model.init_params(seed))[0]


def micro_batch(rows: int, micro_batches: int, field: str) -> int:
    """The rows of a micro-batch. Raises UserError where they cannot be equal.

    rows: of the whole batch, the configuration's `field`.
    """
    if rows % micro_batches:
        raise UserError(
            f"micro_batches is {micro_batches}, which does not divide the {field} of {rows}"
        )
    return rows // micro_batches


def first_listings(catalog: Catalog) -> list[int]:
    """The training listings whose texts a preset's tokenizer is trained on, as indices."""
    return catalog.indices("train")[:TOKENIZER_LISTINGS].tolist()
