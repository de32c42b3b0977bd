"""Writes a model as a Hugging Face folder: python -m afmrl_jax.main --config=configs/export.py
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
    # The folder to write. It may replace only a folder that export wrote.
    config.out = ""
    config.dtype = "float32"  # float32 | bfloat16: type of the written weights
    return config.lock()
