"""Judges a checkpoint: python -m afmrl_jax.main --config=configs/evaluate.py
--config.checkpoint=runs/agcl --config.eval.queries=A --config.eval.gallery=A,B
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.get_config()
    config.program = "evaluate"
    config.checkpoint = ""  # a run's workdir, or one folder of its checkpoints
    config.best = False  # of a workdir, the best on validation instead of the last

    config.eval = ConfigDict()
    config.eval.queries = ""  # catalogues whose listings are looked up; "" = data.path
    config.eval.gallery = ""  # catalogues searched; "" = the queries'
    config.eval.query_split = ""  # train | validation | test | all; "" = test, else all
    config.eval.gallery_split = ""
    config.eval.tasks = "image+text->image+text, image->image, text->text, image->text, text->image"
    config.eval.batch = 128  # rows embedded at once
    config.eval.attributes = False  # the listings' structured attributes join their texts
    return config.lock()
