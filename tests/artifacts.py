"""What several test modules need: what takes long is made once for all workers."""

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path

from afmrl_jax.configs import agcl


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """`folder`, made by make(folder) in the worker that needs it first; others wait for that. One
    whose making failed is made again by the next."""
    whole = folder.with_name(folder.name + ".whole")
    with folder.with_name(folder.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not whole.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            whole.touch()
    return folder


def smallest_agcl(catalogue_folder: Path, cache_dir: str):
    """configs/agcl.py at its smallest: 6 steps of 8 pairs, in one process."""
    config = agcl.get_config()
    config.update(steps=6, batch=8, log_every=1, eval_every=3, checkpoint_every=2)
    config.data.update(
        path=str(catalogue_folder),
        cache_dir=cache_dir,
        workers=0,
        max_tokens=24,
        max_patches=16,
        min_pixels=256,
        max_pixels=1024,
        neighbours=4,
    )
    config.model.update(vocab_size=300, dtype="float32")
    config.optimizer.learning_rate = 5e-4
    config.eval.update(batch=8, tasks="image+text->image+text, image->text")
    return config
