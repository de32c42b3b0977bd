"""Writes a model for others: python -m afmrl_jax.main --config=configs/export.py
--config.checkpoint=runs/agcl --config.out=exported
"""

from ml_collections import ConfigDict

from afmrl_jax.configs import common, evaluate


def get_config() -> ConfigDict:
    config = common.get_config()
    config.program = "export"
    # A run's workdir, one folder of its checkpoints, an exported or another Hugging Face folder.
    config.checkpoint = ""
    config.best = False  # of a workdir, the best on validation instead of the last
    evaluate.folder(config)
    config.out = ""  # the Hugging Face folder to write; one that export wrote is replaced
    config.dtype = "float32"  # float32 | bfloat16: the type of the weights written
    return config.lock()
