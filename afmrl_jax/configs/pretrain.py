"""The base: a tiny Qwen-VL that learns to see and to name, from products of a world of its own.

configs/pretrain.py        an hour or more on two CPU cores; the same command again goes on
configs/pretrain.py:tiny   a few steps, in seconds: shows the program, trains no base

The program is that of configs/sft.py. No product of the world is in the built-in catalogue. What
this page trained ships with the package: init_from=base. launch/base.sh trains it and writes it.
"""

from ml_collections import ConfigDict

from afmrl_jax.configs import common, sft

ARMS = ("pretrain", "tiny")


def get_config(arm: str = "pretrain") -> ConfigDict:
    common.check_arm(arm, ARMS)
    config = sft.get_config("tiny" if arm == "tiny" else "sft").unlock()
    config.data.path = "world"
    # It must see without words, read without photos, and use both.
    config.data.question_views = "image+text 0.45, image 0.4, text 0.15"
    config.data.subset_share = 0.15
    config.data.caption_share = 0.1
    if arm == "pretrain":
        config.steps = 8000
        config.batch = 32
        config.micro_batches = 4
        config.log_every = 50
        config.eval_every = 1000
        config.checkpoint_every = 250
        config.data.buckets = 4
        config.optimizer.warmup_share = 0.03
        config.eval.validation_listings = 256
    return config.lock()
