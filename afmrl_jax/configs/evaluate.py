"""Judges a checkpoint: python -m afmrl_jax.main --config=configs/evaluate.py
--config.checkpoint=runs/agcl --config.eval.queries=A --config.eval.gallery=A,B
"""

from ml_collections import ConfigDict

from afmrl_jax.configs import common


def get_config() -> ConfigDict:
    config = common.get_config()
    config.program = "evaluate"
    # a run's workdir, one folder of its checkpoints, an exported or other Hugging Face folder
    config.checkpoint = ""
    config.best = False  # of a workdir, the best on validation instead of the last

    # How to use a Hugging Face model; a run, and a folder exported from one, knows this itself.
    config.model = ConfigDict()
    config.model.dtype = "bfloat16"  # of the computation
    config.model.embedding_dim = 0  # first dimensions kept of the embedding; 0 = all
    config.data.prompt = "plain"  # plain | chat: the model's chat template, as Qwen3-VL-Embedding's
    config.data.instruction = ""  # before each text; with chat, as the system ("" = its folder's)
    config.data.max_tokens = 512  # a row's tokens, images included
    config.data.max_patches = 1536  # a row's patches, over all its images
    config.data.min_pixels = 3136  # an image is enlarged to this area
    config.data.max_pixels = 301056  # and reduced to this one

    config.eval = ConfigDict()
    config.eval.queries = ""  # catalogues whose listings are looked up; "" = data.path
    config.eval.gallery = ""  # catalogues searched; "" = the queries'
    config.eval.query_split = ""  # train | validation | test | all; "" = test, else all
    config.eval.gallery_split = ""
    config.eval.tasks = "image+text->image+text, image->image, text->text, image->text, text->image"
    config.eval.batch = 128  # rows embedded at once
    # whose attributes join the texts: none | oracle, those of the catalogue or of data.attributes |
    config.eval.attributes = "none"  # a generator's: a run's workdir, a checkpoint, a folder
    config.eval.enrich = "both"  # both | queries | gallery: whose texts
    config.eval.min_confidence = 0.0  # a generator's attributes below this are left out; in [0, 1]
    # also judge by category: a linear probe and k-means on embeddings of the queries, as the first
    config.eval.downstream = False  # task shows them, but for the category in their text
    config.eval.probe_listings = 5000  # at most, of the queries' training split, for the probe
    return config.lock()
