"""Judges a checkpoint: python -m afmrl_jax.main --config=configs/evaluate.py
--config.checkpoint=runs/agcl --config.eval.queries=A --config.eval.gallery=A,B

configs/evaluate.py:tiny judges on the validation listings, of which there are fewer.
"""

from ml_collections import ConfigDict

from afmrl_jax.configs import common

ARMS = ("evaluate", "tiny")


def folder(config: ConfigDict) -> None:
    """How to use a Hugging Face model. A run, and a folder exported from a run, have these settings
    already."""
    config.model = ConfigDict()
    config.model.dtype = "bfloat16"  # float32 | bfloat16: the computation's type
    config.model.embedding_dim = 0  # first dimensions kept of the embedding; 0 = all
    common.rows(config, max_tokens=512)
    config.data.max_patches = 1536
    config.data.max_pixels = 301056
    # The prompt "plain" puts the instruction before each text. The prompt "chat" makes it the
    # system's turn of the model's chat template (Qwen3-VL-Embedding); "" keeps the template's turn.
    config.data.prompt = "plain"  # plain | chat


def get_config(arm: str = "evaluate") -> ConfigDict:
    common.check_arm(arm, ARMS)
    config = common.get_config()
    config.program = "evaluate"
    config.seed = 0  # seed of the probe and of k-means
    common.catalogue(config)
    common.attributes(config)
    # A run's workdir, one folder of its checkpoints, an exported or another Hugging Face folder.
    config.checkpoint = ""
    config.best = False  # of a workdir, the best on validation instead of the last

    folder(config)

    config.eval = ConfigDict()
    config.eval.queries = ""  # catalogues of the queries; "" = data.path
    config.eval.gallery = ""  # catalogues of the gallery; "" = those of the queries
    config.eval.query_split = ""  # train | validation | test | all; "" = test, else all
    config.eval.gallery_split = ""  # the same for the gallery
    config.eval.tasks = "image+text->image+text, image->image, text->text, image->text, text->image"
    config.eval.batch = 128  # rows embedded at once
    # Attributes to add to the texts: none; oracle, those of the catalogue or of data.attributes; or
    # those of a generator, given as a run's workdir, a checkpoint or a folder.
    config.eval.attributes = "none"
    config.eval.enrich = "both"  # both | queries | gallery: side whose texts have them
    config.eval.min_confidence = 0.0  # least confidence of a generator's attributes, in [0, 1]
    # A linear probe and k-means judge by category the queries' embeddings, those of the first task
    # without the category in the text.
    config.eval.downstream = False
    config.eval.probe_listings = 5000  # listings at most, of the training split, for the probe

    if arm == "tiny":
        config.eval.update(query_split="validation", gallery_split="validation")
        config.eval.tasks = "image+text->image+text"
        config.eval.probe_listings = 200
    return config.lock()
