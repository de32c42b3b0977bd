"""Checkpoints of a run: state, stream position and everything that its embeddings depend on.

A checkpoint is whole or absent: Orbax writes to a temporary folder and renames it, or in a bucket
adds a last object, after a manifest of the files is written. The state is saved in parts: params;
optimizer, whose step is the stream's position; memory, where a method has one. Beside them is the
run's record, strings by name: config, model, tokenizer, corpus statistics, the catalogue's
fingerprint. Where a checkpoint has changed since it was written, the one before it is used; readers
of parameters check the files of the parameters alone.
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
from afmrl_jax.core.types import Params

log = logging.getLogger("afmrl_jax")

_UNFINISHED = ".orbax-checkpoint-tmp"  # end of the name of Orbax's temporary folders
_OPTIMIZER, _MEMORY = "optimizer", "memory"  # parts that only a resumed run reads
_KEPT = 2  # last checkpoints; the best is kept as well


class Checkpoints:
    """The checkpoints under a folder: the last two are kept, and the best on validation.

    Every process opens them and calls the same methods in the same order, because they check for
    damage together.
    """

    def __init__(self, folder: epath.PathLike, *, writable: bool = False):
        """folder: a local one, or gs://BUCKET/FOLDER. writable: for the run that writes them. Then
        the files of a killed save are removed, and damaged checkpoints are renamed; other readers
        do not read the optimizer.

        Raises UserError where a writable folder holds only damaged checkpoints, or where this
        installation cannot reach the folder's store.
        """
        self.folder = _reached(folder)
        self._problems: dict[int, str] = {}  # by checked step; "" = whole
        self._saved: set[int] = set()  # steps that this object saved
        self._writing = 0  # step of the save under way, or of the last one
        self._needed = 0  # bytes of a state
        self._error: BaseException | None = None  # of a save; set with several processes alone
        self._unread = () if writable else (f"{_OPTIMIZER}/", f"{_MEMORY}/")
        self._orbax = None
        if writable:
            self._clean()
            self._set_aside()
            # A lambda: Orbax copies its options, and would copy the object of a bound method.
            self._orbax = _writer(self.folder, lambda: self._seal())
            if jax.process_count() > 1:
                orbax_fixes.hear_of_errors(self._orbax, self._set_error)

    @property
    def latest(self) -> int | None:
        """The step of the newest whole checkpoint. Raises UserError where all are damaged."""
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
        """The step with the best validation; the newest of equals."""
        scored = [(score, s) for s in self._steps() if (score := self._score(s)) is not None]
        return next((s for _, s in sorted(scored, reverse=True) if self._is_whole(s)), None)

    def has(self, step: int) -> bool:
        """Whether the step is saved. Raises UserError with the damage where it is not whole."""
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

        Raises UserError where this save or the one before it fails, as on a full disk.
        """
        self.wait()
        self._needed, self._writing = _size(state), step
        try:
            self._orbax.save_checkpointables_async(
                step,
                _parts(state) | {"run": record},
                metrics=None if validation is None else {"validation": validation},
            )
        except Exception as error:  # of Orbax, TensorStore or the system
            raise self._failed(error) from error
        self._saved.add(step)

    def wait(self) -> None:
        """Waits until the save is written. Raises UserError where it fails."""
        try:
            while self._error is None and jax.process_count() > 1 and orbax_fixes.is_saving():
                time.sleep(0.02)
            if self._error:
                raise self._error
            self._orbax.wait()
        except Exception as error:
            raise self._failed(error) from error

    def check_space(self, state: TrainState) -> None:
        """Raises UserError where the disk has no room for a checkpoint; warns where it has none for
        all that are kept. A bucket is not checked."""
        if is_bucket(self.folder):
            return
        size, free = _size(state), _free(self.folder)
        if free < size:
            raise UserError(
                f"{self.folder} has {_bytes(free)} free, and a checkpoint needs {_bytes(size)}: "
                "make room, or copy what is saved to another disk and name that folder with "
                "--config.checkpoint_dir"
            )
        # Beside the last ones, the best is kept, and another one is being written.
        remaining = (_KEPT + 2 - len(self._steps())) * size
        if free < remaining:
            log.warning(
                "%s has %s free: the checkpoints that are kept may need %s more",
                *(self.folder, _bytes(free), _bytes(remaining)),
            )

    def record(self, step: int) -> dict[str, str]:
        """The strings saved beside the state."""
        return ocp.load_checkpointables(self.folder / str(step), {"run": None})["run"]

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state, straight into the shardings of `abstract`, whatever mesh it was saved from."""
        return _joined(ocp.load_checkpointables(self.folder / str(step), _parts(abstract)))

    def restore_params(self, step: int, abstract: Params) -> Params:
        """The parameters alone, straight into the shardings of `abstract`.

        Raises ValueError where one of them was not saved: Orbax would leave it abstract.
        """
        folder, context = self.folder / str(step), ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            params = ocp.load_checkpointables(folder, {"params": abstract})["params"]
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
            raise ValueError(f"{folder} lacks some of these parameters")
        return params

    def restore_raw(self, step: int) -> dict[str, Any]:
        """The saved state as nested containers of arrays on this process's device."""
        folder = self.folder / str(step)
        names = ["params", _OPTIMIZER, *([_MEMORY] if (folder / _MEMORY).is_dir() else [])]
        loaded = ocp.load_checkpointables(folder, dict.fromkeys(names))
        return loaded.pop(_OPTIMIZER) | loaded

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error_type: type | None, *_: Any) -> None:
        """Waits until the last save is written, also where a run ends in an error."""
        if self._orbax is None or self._error:  # after an error Orbax would wait for nothing
            return
        try:
            self._orbax.close()
        except Exception as error:
            failed = self._failed(error)
            if error_type is None:
                raise failed from error
            log.error("%s", failed)  # another error ends the run already

    def _steps(self) -> list[int]:
        """Steps that have a folder, whole or not, in order."""
        return _steps(self.folder)

    def _score(self, step: int) -> float | None:
        """The validation score in Orbax's file of a step; None without. Orbax would read the files
        of all steps at once, and fail where one is damaged."""
        try:
            text = (self.folder / str(step) / "metrics" / "metrics").read_text()
            return json.loads(text)["validation"]
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _is_torn(self, step: int) -> bool:
        """Whether the step has a file of scores that cannot be read."""
        try:
            json.loads((self.folder / str(step) / "metrics" / "metrics").read_text())
        except (OSError, ValueError) as error:
            return not isinstance(error, FileNotFoundError)
        return False

    def _is_whole(self, step: int) -> bool:
        """Whether a checkpoint is whole. Checks it once, and warns of damage."""
        folder = self.folder / str(step)
        if step in self._saved:
            return is_finished(folder)
        if step not in self._problems:
            self._problems[step] = agree(find_damage(folder, self._unread))
            if self._problems[step] and jax.process_index() == 0:
                log.warning(
                    "%s is left for the checkpoint before it: %s", folder, self._problems[step]
                )
        return not self._problems[step]

    def _clean(self) -> None:
        """Removes the files of unfinished saves."""
        # Orbax's clean-up would log errors: its thread outlives a program that ends at once.
        if jax.process_index() or not self.folder.is_dir():
            return
        for path in list(self.folder.iterdir()):
            unfinished = is_bucket(path) and path.name.isdigit() and not is_finished(path)
            if unfinished or path.name.endswith(_UNFINISHED):
                with contextlib.suppress(OSError):  # another process may still write there
                    path.rmtree()

    def _set_aside(self) -> None:
        """Renames damaged checkpoints: those newer than the newest whole one, because the run will
        write these steps again; and older ones whose score is unreadable, because Orbax reads the
        scores of all steps and fails at such a one."""
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
        """Waits until this process sees the newest checkpoint that any process sees: network file
        systems show a new folder late (NFS up to a minute), and all must resume from one step.

        patience: seconds to wait; after them it raises TryAgain.
        """
        if jax.process_count() == 1:
            return
        local = max(self._steps(), default=-1)
        newest = int(multihost_utils.process_allgather(np.int32(local)).max())
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
        """Writes the manifest of the save under way, before Orbax marks it as finished."""
        names = (f"{self._writing}{_UNFINISHED}", str(self._writing))
        write_manifest(next(p for name in names if (p := self.folder / name).is_dir()))

    def _failed(self, error: Exception) -> UserError:
        """The error for the user where `error` ended a save, whose files are removed."""
        self._clean()
        # No check for damage: it needs all processes, and this may be the only one that failed.
        sound = [step for step in self._steps() if not self._problems.get(step)]
        whole = [step for step in sound if is_finished(self.folder / str(step))]
        sentences = [f"step {self._writing} could not be saved in {self.folder}: {_reason(error)}"]
        if not is_bucket(self.folder):
            sentences.append(
                f"{_bytes(_free(self.folder))} are free there, and a checkpoint needs up to "
                f"{_bytes(self._needed)}"
            )
        goes_on = f"goes on from step {whole[-1]}, which is whole" if whole else "begins anew"
        sentences.append(f"make room, or mend what is named; then the same command {goes_on}")
        # A bucket may be reachable again although the user changes nothing.
        error_class = TryAgain if is_bucket(self.folder) else UserError
        return error_class(
            ". ".join(s[0].upper() + s[1:] if n else s for n, s in enumerate(sentences))
        )


def checkpoint_folder(checkpoint_dir: str, workdir: Path) -> epath.Path:
    """The folder of a run's checkpoints: `checkpoint_dir`, with "" one in its workdir.

    Raises UserError where it holds no checkpoint, but another folder holds some of the run; and
    where this installation cannot reach the store of a folder.
    """
    chosen = _reached(checkpoint_dir or workdir / "checkpoints")
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

    path: a run's workdir, the folder of its checkpoints, or that of one step. best: False for the
    last checkpoint of a run, True for the best on validation, None for the best where the run
    validated any, else the last. Raises UserError where there is no whole checkpoint.
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
    """The state as the parts that are saved and read separately."""
    parts = {
        "params": state.params,
        _OPTIMIZER: {"step": state.step, "opt_state": state.opt_state},
    }
    return parts | ({_MEMORY: state.memory} if state.memory else {})


def _joined(parts: dict[str, Any]) -> TrainState:
    """The state of its parts."""
    return TrainState(params=parts["params"], memory=parts.get(_MEMORY, {}), **parts[_OPTIMIZER])


def _reached(folder: epath.PathLike) -> epath.Path:
    """The folder, with an absolute path if local. Raises UserError where this installation cannot
    reach its store."""
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
    """Orbax's checkpointer, which calls `seal` in the first process before it finishes a save."""
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
    """Free bytes of the disk of a local folder, which need not exist yet."""
    path = Path(folder)
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free


def _bytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def _reason(error: Exception) -> str:
    """The cause in a line: the messages of TensorStore's errors go on for pages."""
    message = str(error)
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
        if os.strerror(code) in message:
            return os.strerror(code).lower()
    return (message.strip() or type(error).__name__).splitlines()[0]
