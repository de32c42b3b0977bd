"""A run, from its configuration to its exit status: what main.py does beyond its flags."""

import importlib
import logging
import os
import traceback
from pathlib import Path

from ml_collections import ConfigDict

from afmrl_jax.core.errors import TryAgain, UserError
from afmrl_jax.core.pages import check_method_fields, check_program

# transformers only reads tokenizers and images here: that it finds no torch is as it should be.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def run(config: ConfigDict, workdir: Path, plan: str | None = None) -> None:
    """Runs `config.program` in `workdir`, on all devices of all processes; with `plan` only tells
    what that would need on such devices."""
    if ":/" in str(workdir):
        raise UserError(
            f"--workdir={workdir}: logs need a file system, as NFS or a bucket mounted by gcsfuse; "
            "for checkpoints alone give --config.checkpoint_dir=gs://BUCKET/FOLDER"
        )
    check_program(config)
    if plan:
        from afmrl_jax.programs import plan as planner  # it sets what JAX reads when it is loaded

        return planner.main(config, workdir, plan)
    import jax  # only now: --help and a mistyped field must not wait for it

    from afmrl_jax.catalog.opening import cache_folder
    from afmrl_jax.checkpoints.integrity import is_bucket
    from afmrl_jax.core.mesh import make_mesh
    from afmrl_jax.core.processes import check_shared, initialize_distributed

    initialize_distributed()
    check_method_fields(config)
    program = importlib.import_module(f"afmrl_jax.programs.{config.program}")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # else the user has said where
        compiled = cache_folder(config.data.cache_dir) / "xla"
        jax.config.update("jax_compilation_cache_dir", str(compiled))
    mesh = make_mesh(dict(config.mesh))
    elsewhere = config.get("checkpoint_dir")
    if program.SHARES_WORKDIR or not is_bucket(elsewhere):
        check_shared(workdir)
    if elsewhere and not is_bucket(elsewhere):
        check_shared(Path(elsewhere).expanduser())
    if jax.process_index():  # what all processes know is told once
        logging.getLogger("afmrl_jax").setLevel(logging.WARNING)
    with jax.set_mesh(mesh):
        program.main(config, workdir, mesh)


def end(error: BaseException, checkpoints: Path) -> int:
    """Says how a run ended; the exit status: 2 where the user got something wrong, 75 where it is
    worth starting again, 1 for what should not happen. Of several processes all end with the status
    of the first that ends by a sentence, and say it."""
    from afmrl_jax.core.last_words import TRY_AGAIN, last_words, leave, lost, say_last

    if reason := lost(error):
        if words := last_words():
            say_last(words[0])
            return leave(words[1])
        saved = checkpoints.glob("*/_CHECKPOINT_METADATA")  # none of a bucket's, which is not asked
        steps = [int(p.parent.name) for p in saved if p.parent.name.isdigit()]
        told = f"step {max(steps)} is saved" if steps else "what was saved stays"
        say_last(
            f"another of the processes ended or can't be reached ({reason}): {told}; start the "
            "same command again on all of them"
        )
        return leave(TRY_AGAIN)
    if isinstance(error, UserError | OSError):  # a full disk is told in a sentence too
        passing = isinstance(error, TryAgain | ConnectionError | TimeoutError)
        status = TRY_AGAIN if passing else 2
        say_last(str(error), status)
        return leave(status)
    traceback.print_exception(error)
    return leave(130 if isinstance(error, KeyboardInterrupt) else 1)
