"""How long a run trains, and how often it looks, saves and logs."""

from dataclasses import dataclass

from afmrl_jax.core.options import Options, between


@dataclass(frozen=True)
class Schedule(Options, section=""):
    """Fields of every program that trains."""

    seed: int = between(0, 2**31 - 1)
    steps: int = between(1)
    log_every: int = between(1)  # steps
    eval_every: int = between(0)  # steps; 0: only at the end
    checkpoint_every: int = between(0)  # steps; 0: only at the end
    checkpoint_dir: str  # "" = WORKDIR/checkpoints
    profile: str  # START:END, the steps to trace; "" = none
    micro_batches: int = between(1)  # equal parts of a batch, one after the other
