"""Writes a model for others: python -m afmrl_jax.main --config=configs/export.py
--config.checkpoint=runs/agcl --config.out=exported
"""

from ml_collections import ConfigDict

from afmrl_jax.configs import evaluate


def get_config() -> ConfigDict:
    config = evaluate.get_config().unlock()
    config.program = "export"
    del config.eval
    config.out = ""  # the Hugging Face folder to write; one that export wrote is replaced
    config.dtype = "float32"  # float32 | bfloat16: the type of the weights written
    return config.lock()
