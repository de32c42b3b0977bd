"""Checkpoints of a run: state, stream position and everything that its embeddings depend on.

A checkpoint is whole or absent: Orbax writes beside and renames, or in a bucket adds a last object,
once a manifest of its files is there too. It holds the state in parts: params; optimizer, whose
step is the stream's position; memory, where a method has one. Beside them stands the run's record,
strings by name: config, model, tokenizer, corpus statistics, the catalogue's fingerprint. One that
is no longer as it was written is left for the one before it; who reads parameters alone looks at
nothing else.
"""

import contextlib
import errno
import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp

from afmrl_jax.checkpoints import orbax_fixes
from afmrl_jax.checkpoints.integrity import (
    agree,
    check_reachable,
    find_damage,
    is_bucket,
    is_finished,
    write_manifest,
)
from afmrl_jax.checkpoints.state import TrainState
from afmrl_jax.core.errors import TryAgain, UserError
from afmrl_jax.core.processes import meet

log = logging.getLogger("afmrl_jax")

_UNFINISHED = ".orbax-checkpoint-tmp"  # how Orbax's folders end until then
_OPTIMIZER, _MEMORY = "optimizer", "memory"  # parts that only a run which goes on reads
_KEPT = 2  # of the last checkpoints; the best is kept beside them


class Checkpoints:
    """The checkpoints under a folder: the last two are kept, and the best on validation.

    Every process opens them, and asks in the same order: they look for damage together.
    """

    def __init__(self, folder: epath.PathLike, *, writable: bool = False):
        """folder: a local one, or gs://BUCKET/FOLDER. writable: this run's own, where what a killed
        save left is cleaned away, and what is damaged is set aside under another name; others read
        no optimizer.

        Raises UserError where a run's own folder holds nothing but damaged ones, or where it is in
        a store that this installation cannot reach.
        """
        self.folder = _reached(folder)
        self._problems: dict[int, str] = {}  # of the steps that were looked through; "" = whole
        self._own: set[int] = set()  # steps that were written here
        self._writing = 0  # the step that is being written, or was last
        self._needed = 0  # bytes of a state
        self._error: BaseException | None = None  # of a save, where there are several processes
        self._unread = () if writable else (f"{_OPTIMIZER}/", f"{_MEMORY}/")
        self._orbax = None
        if writable:
            self._clean()
            self._set_aside()
            # A plain function: Orbax copies its options, and a method's object with them.
            self._orbax = _writer(self.folder, lambda: self._seal())
            if jax.process_count() > 1:
                orbax_fixes.hear_of_errors(self._orbax, self._set_error)

    @property
    def latest(self) -> int | None:
        """The newest whole checkpoint's step. Raises UserError where all are damaged."""
        steps = self._steps()
        for step in reversed(steps):
            if self._is_whole(step):
                return step
        if problems := [f"step {s}: {p}" for s in steps if (p := self._problems.get(s))]:
            raise UserError(
                f"{self.folder} holds no checkpoint that can be read whole ({'; '.join(problems)}"
                "). Bring one back from a copy, or move the folder away to start anew"
            )
        return None

    @property
    def best(self) -> int | None:
        """The step that did best on validation; the newest of equals."""
        scored = [(score, s) for s in self._steps() if (score := self._score(s)) is not None]
        return next((s for _, s in sorted(scored, reverse=True) if self._is_whole(s)), None)

    def has(self, step: int) -> bool:
        """Whether that step is saved. Raises UserError, saying why, where it is not whole."""
        if step not in self._steps():
            return False
        if not self._is_whole(step):
            raise UserError(
                f"{self.folder / str(step)} cannot be read whole: {self._problems[step]}; name "
                "another checkpoint"
            )
        return True

    def save(
        self, state: TrainState, record: dict[str, str], step: int, validation: float | None
    ) -> None:
        """Begins to write; the state may be donated as soon as this returns.

        Raises UserError where this, or the save before it, fails, as on a full disk.
        """
        self.wait()
        self._needed, self._writing = _size(state), step
        try:
            self._orbax.save_checkpointables_async(
                step,
                _parts(state) | {"run": record},
                metrics=None if validation is None else {"validation": validation},
            )
        except Exception as error:  # Orbax's, TensorStore's, the system's: all end the same way
            raise self._failed(error) from error
        self._own.add(step)

    def wait(self) -> None:
        """Until all is written. Raises UserError where it could not be."""
        try:
            while self._error is None and jax.process_count() > 1 and orbax_fixes.is_saving():
                time.sleep(0.02)
            if self._error:
                raise self._error
            self._orbax.wait()
        except Exception as error:
            raise self._failed(error) from error

    def check_space(self, state: TrainState) -> None:
        """Raises UserError where the disk has no room for one checkpoint; warns where it has none
        for all that are kept. Of a bucket nothing is known."""
        if is_bucket(self.folder):
            return
        size, free = _size(state), _free(self.folder)
        if free < size:
            raise UserError(
                f"{self.folder} has {_bytes(free)} free, and a checkpoint needs {_bytes(size)}: "
                "make room, or copy what is saved to another disk and name that folder with "
                "--config.checkpoint_dir"
            )
        wanted = (_KEPT + 2 - len(self._steps())) * size  # the best, and the one that is written
        if free < wanted:
            log.warning(
                "%s has %s free: the checkpoints that are kept may need %s more",
                *(self.folder, _bytes(free), _bytes(wanted)),
            )

    def record(self, step: int) -> dict[str, str]:
        """The strings saved beside the state."""
        return ocp.load_checkpointables(self.folder / str(step), {"run": None})["run"]

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state, straight into the shardings of `abstract`, whatever mesh it was saved from."""
        return _joined(ocp.load_checkpointables(self.folder / str(step), _parts(abstract)))

    def restore_params(self, step: int, abstract: Any) -> Any:
        """The parameters alone, straight into the shardings of `abstract`.

        Raises ValueError where one of them was not saved, which Orbax would leave abstract.
        """
        folder, context = self.folder / str(step), ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            params = ocp.load_checkpointables(folder, {"params": abstract})["params"]
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
            raise ValueError(f"{folder} lacks some of these parameters")
        return params

    def restore_raw(self, step: int) -> Any:
        """The state as nested containers of arrays on this process's device, as it was saved."""
        folder = self.folder / str(step)
        names = ["params", _OPTIMIZER, *([_MEMORY] if (folder / _MEMORY).is_dir() else [])]
        loaded = ocp.load_checkpointables(folder, dict.fromkeys(names))
        return loaded.pop(_OPTIMIZER) | loaded

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        """Waits until everything is written, also where a run ends in an error."""
        if self._orbax is None or self._error:  # nothing would come of it but a long wait
            return
        try:
            self._orbax.close()
        except Exception as error:
            failed = self._failed(error)
            if kind is None:
                raise failed from error
            log.error("%s", failed)  # beside the error that ends the run

    def _steps(self) -> list[int]:
        """Steps that have a folder, whole or not, in order."""
        return _steps(self.folder)

    def _score(self, step: int) -> float | None:
        """The validation saved with a step, where Orbax puts it; None without. Orbax itself reads
        it of all steps at once, and fails where one is damaged."""
        try:
            text = (self.folder / str(step) / "metrics" / "metrics").read_text()
            return json.loads(text)["validation"]
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _is_torn(self, step: int) -> bool:
        """Whether there is a score that cannot be read."""
        try:
            json.loads((self.folder / str(step) / "metrics" / "metrics").read_text())
        except (OSError, ValueError) as error:
            return not isinstance(error, FileNotFoundError)
        return False

    def _is_whole(self, step: int) -> bool:
        """Looks a checkpoint through, once, and says so where it is damaged."""
        folder = self.folder / str(step)
        if step in self._own:
            return is_finished(folder)
        if step not in self._problems:
            self._problems[step] = agree(find_damage(folder, self._unread))
            if self._problems[step] and jax.process_index() == 0:
                log.warning(
                    "%s is left for the checkpoint before it: %s", folder, self._problems[step]
                )
        return not self._problems[step]

    def _clean(self) -> None:
        """Removes what saves left that did not come to their end."""
        # Not Orbax's own clean-up: its thread outlives a program that ends at once, and complains.
        if jax.process_index() or not self.folder.is_dir():
            return
        for path in list(self.folder.iterdir()):
            unfinished = is_bucket(path) and path.name.isdigit() and not is_finished(path)
            if unfinished or path.name.endswith(_UNFINISHED):
                with contextlib.suppress(OSError):  # one that fails may still be written to
                    path.rmtree()

    def _set_aside(self) -> None:
        """Renames what is damaged and newer than the newest whole one: the run comes by there. And
        what is older where its score is torn: Orbax reads all scores, and fails at one."""
        meet("checkpoints cleaned")
        self._see_newest()
        whole = self.latest
        steps = self._steps() if whole is not None else []
        damaged = [step for step in steps if step > whole or self._is_torn(step)]
        meet("checkpoints looked through")
        for step in damaged if jax.process_index() == 0 else ():
            path = self.folder / str(step)
            names = (f"{step}.damaged{n or ''}" for n in itertools.count())
            aside = next(a for name in names if not (a := self.folder / name).exists())
            path.rename(aside)
            log.warning("%s is set aside as %s; step %d goes on", path, aside.name, whole)
        meet("checkpoints set aside")

    def _see_newest(self, patience: float = 90.0) -> None:
        """Until this process sees the newest checkpoint that any of them sees: network file systems
        show a new folder late (NFS up to a minute), and all must go on from one step.

        patience: seconds. Raises TryAgain where they are not enough.
        """
        if jax.process_count() == 1:
            return
        own = max(self._steps(), default=-1)
        newest = int(multihost_utils.process_allgather(np.int32(own)).max())
        deadline = time.monotonic() + patience
        while newest >= 0 and newest not in self._steps():
            if time.monotonic() > deadline:
                raise TryAgain(
                    f"process {jax.process_index()} does not see {self.folder / str(newest)}, which"
                    " another one sees: all machines must share that folder; start again"
                )
            time.sleep(0.2)

    def _set_error(self, error: BaseException) -> None:
        self._error = error

    def _seal(self) -> None:
        """Writes the manifest of the step that is being written, before Orbax calls it whole."""
        names = (f"{self._writing}{_UNFINISHED}", str(self._writing))
        write_manifest(next(p for name in names if (p := self.folder / name).is_dir()))

    def _failed(self, error: Exception) -> UserError:
        """What to tell where `error` ended a save; what it left is removed."""
        self._clean()
        # Looking for damage takes all processes, and this may be the only one that failed.
        sound = [step for step in self._steps() if not self._problems.get(step)]
        whole = [step for step in sound if is_finished(self.folder / str(step))]
        told = [f"step {self._writing} could not be saved in {self.folder}: {_reason(error)}"]
        if not is_bucket(self.folder):
            told.append(
                f"{_bytes(_free(self.folder))} are free there, and a checkpoint needs up to "
                f"{_bytes(self._needed)}"
            )
        goes_on = f"goes on from step {whole[-1]}, which is whole" if whole else "begins anew"
        told.append(f"make room, or mend what is named; then the same command {goes_on}")
        # A bucket may be reached again with nothing mended.
        kind = TryAgain if is_bucket(self.folder) else UserError
        return kind(". ".join(t[0].upper() + t[1:] if n else t for n, t in enumerate(told)))


def checkpoint_folder(config: ConfigDict, workdir: Path) -> epath.Path:
    """Where a run's checkpoints lie: `config.checkpoint_dir`, else in its workdir.

    Raises UserError where there are none yet, and the run has some in another folder; and where one
    of them is in a store that this installation cannot reach.
    """
    chosen = _reached(config.checkpoint_dir or workdir / "checkpoints")
    for other in (workdir / "checkpoints", *_elsewhere(epath.Path(workdir))):
        before = _reached(other)
        if before != chosen and _steps(before) and not _steps(chosen):
            raise UserError(
                f"the checkpoints of {workdir} are in {before}, and {chosen} has none: copy them "
                "there first, or name another --workdir to start anew"
            )
    return chosen


def find_checkpoints(path: str, *, best: bool | None = False) -> tuple[Checkpoints, int]:
    """The checkpoints that `path` names, and the step.

    path: a run's workdir (its last checkpoint, with `best` the best on validation, with None the
    best where the run validated any), the folder of its checkpoints or that of one step. Raises
    UserError where there is none that is whole.
    """
    folder = _reached(path)
    for root in (*_elsewhere(folder), folder / "checkpoints", folder):
        checkpoints = Checkpoints(root)
        if checkpoints.latest is None:
            continue
        if best and checkpoints.best is None:
            raise UserError(f"{path} has no validated checkpoint: leave best out")
        chosen = checkpoints.latest if best is False else checkpoints.best
        return checkpoints, chosen or checkpoints.latest
    if folder.name.isdigit():
        checkpoints = Checkpoints(folder.parent)
        if checkpoints.has(int(folder.name)):
            return checkpoints, int(folder.name)
    raise UserError(
        f"{path} holds no whole checkpoint: give a run's workdir, one folder of its checkpoints, "
        "or a Hugging Face folder with its *.safetensors"
    )


def _parts(state: TrainState) -> dict[str, Any]:
    """The state as the parts that are read apart."""
    parts = {
        "params": state.params,
        _OPTIMIZER: {"step": state.step, "opt_state": state.opt_state},
    }
    return parts | ({_MEMORY: state.memory} if state.memory else {})


def _joined(parts: dict[str, Any]) -> TrainState:
    """The state of its parts."""
    return TrainState(params=parts["params"], memory=parts.get(_MEMORY, {}), **parts[_OPTIMIZER])


def _reached(folder: epath.PathLike) -> epath.Path:
    """The folder, a local one's path whole. Raises UserError where it is in a store that this
    installation cannot reach."""
    check_reachable(folder)
    return epath.Path(folder if is_bucket(folder) else Path(folder).expanduser().absolute())


def _steps(folder: epath.Path) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def _elsewhere(workdir: epath.Path) -> list[epath.Path]:
    """The checkpoint_dir of the run in `workdir`, where it has one."""
    try:
        folder = json.loads((workdir / "config.json").read_text()).get("checkpoint_dir")
    except (OSError, ValueError, AttributeError):
        return []
    return [epath.Path(folder)] if folder else []


def _writer(folder: epath.Path, seal: Callable[[], None]) -> ocp.training.Checkpointer:
    """Orbax's checkpointer, which calls `seal` in the first process before a save becomes whole."""
    policies = ocp.training.preservation_policies
    best = policies.BestN(
        get_metric_fn=lambda metrics: metrics["validation"],
        n=1,
        keep_checkpoints_without_metrics=False,
    )
    context = ocp.Context()
    context.asynchronous.post_finalization_callback = seal
    return ocp.training.Checkpointer(
        folder,
        context=context,
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
        preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(_KEPT), best]),
    )


def _size(state: TrainState) -> int:
    """Bytes of a whole state, over all devices."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def _free(folder: epath.Path) -> int:
    """Bytes that are free where a local folder lies, or will."""
    path = Path(folder)
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free


def _bytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def _reason(error: Exception) -> str:
    """The line of an error that says what happened: TensorStore's go on for pages."""
    told = str(error)
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
        if os.strerror(code) in told:
            return os.strerror(code).lower()
    return (told.strip() or type(error).__name__).splitlines()[0]
