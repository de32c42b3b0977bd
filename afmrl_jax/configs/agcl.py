"""Stage 1: the encoder, trained with attribute-guided contrastive learning.

configs/agcl.py           AGCL on the built-in catalogue, small enough for two CPU cores
configs/agcl.py:vlm2vec   the VLM2Vec baseline: the same code, weights and attribute masks off
configs/agcl.py:head      that baseline with a head beside it that learns the attributes as labels
configs/agcl.py:tiny      a few steps of AGCL, in seconds: a look at the program, no good encoder
"""

from ml_collections import ConfigDict

from afmrl_jax.configs import common

ARMS = ("agcl", "vlm2vec", "head", "tiny")


def get_config(arm: str = "agcl") -> ConfigDict:
    common.check_arm(arm, ARMS)
    config = common.get_config()
    config.program = "agcl"
    common.catalogue(config)
    common.attributes(config)
    common.schedule(config, steps=400, evaluators="retrieval")
    config.eval_every = 100
    config.checkpoint_every = 50

    config.method = "agcl"  # agcl, or module:Class, an objective of your own
    config.batch = 64  # pairs of the global batch (VLM2Vec-V2: 1024)
    common.batches(config)  # micro-batches by GradCache: each one's loss is of the whole batch
    config.init_from = ""  # a checkpoint or a Hugging Face folder; "" = from scratch

    common.model(config)
    # tiny | tiny_qwen2_5 | tiny_qwen3 | qwen2_vl_2b | qwen2_5_vl_3b | qwen3_vl_2b | ...
    config.model.preset = "tiny"  # name in models/presets.py; unused with init_from
    config.model.embedding_dim = 0  # first dimensions kept of the embedding; 0 = all
    config.model.vocab_size = 4096  # tokens of the tokenizer that a preset trains on its catalogue
    common.optimizer(config, learning_rate=2e-3)  # VLM2Vec-V2: 5e-5, from pretrained weights

    # Of too long a text the description is cut first, then the end of title and category, down to a
    # quarter of the text's room, then attributes.
    common.rows(config, max_tokens=96)
    # The instruction stands before each text. With the prompt "chat" it is the system's turn of the
    # model's chat template, as Qwen3-VL-Embedding's, and "" is the folder's own.
    config.data.prompt = "plain"  # plain | chat
    config.data.query_views = "image+text 0.9, image 0.05, text 0.05"  # views and their shares
    config.data.target_views = "image+text 0.9, image 0.05, text 0.05"
    config.data.crop_area = 1.0  # least share of an image's area that a training crop keeps
    config.data.flip_share = 0.0  # share of training images that are mirrored
    config.data.described_only = False  # training listings without attributes are left out
    # An encoder makes use of attributes in a query only if it has seen them in training texts.
    config.data.attribute_share = 0.7  # share of training texts that carry the attributes
    config.data.attribute_dropout = 0.3  # share of those attributes that are left out
    # As many values are wrong in training as the generator will get wrong, so that the encoder
    # trusts attributes as far as it may.
    config.data.attribute_noise = 0.3  # share of values replaced by another listing's
    # Where most products have one listing this is 0.
    config.data.lookalike_share = 0.25  # share of a batch that is groups of look-alikes
    config.data.lookalike_group = 4  # products of a group
    config.data.hard_negatives = 0  # listings of other products, mined for each query
    config.data.neighbours = 16  # look-alikes remembered of each product
    config.data.max_terms = 32  # attribute terms kept of a listing, the rarest first

    config.loss = ConfigDict()  # losses/contrastive.py
    config.loss.temperature = 0.05  # VLM2Vec-V2: 0.02, from pretrained weights
    config.loss.negative_weight = "bm25"  # none (InfoNCE) | bm25 (AGCL) | similarity (LLaVE)
    config.loss.weight_scale = "self"  # self (by the query's own score) | raw (the paper's)
    config.loss.weight_strength = 1.0  # a in w = exp(a (1 + tanh B)); the paper: 1
    config.loss.similarity_strength = 9.0  # LLaVE's alpha, with negative_weight = similarity
    config.loss.boost_positive = True  # whether the positive is weighted too, as in the paper
    # A threshold that nothing passes turns a mask off: 2 of cosines, 1 of agreements.
    config.loss.mask_target_similarity = 2.0  # drop j if cos(d_j, d_i) above; RzenEmbed .95
    config.loss.mask_margin = 2.0  # drop j if s_ij > s_ii + this; UniME .1
    config.loss.mask_attributes = 0.95  # drop j if the attributes agree both ways above this
    config.loss.same_product = "drop"  # drop | positive | keep: other listings of the product
    config.loss.symmetric = True  # whether targets look for queries too
    # Cross-batch memory: targets of the last batches as further negatives of the queries (MOON).
    config.loss.memory_batches = 0  # batches that are remembered; 0 = none
    # losses/labels.py: beside the loss above a linear layer tells attributes from embeddings.
    config.loss.head_weight = 0.0  # weight of its loss, in nats an attribute; 0 = no such head
    config.loss.head_labels = 2048  # the most frequent pairs of name and value, which it tells

    config.eval = ConfigDict()
    config.eval.tasks = "image+text->image+text, image->image, text->text, image->text, text->image"
    config.eval.batch = 128  # rows embedded at once
    config.eval.attributes = "none"  # none | oracle: the catalogue's attributes join the texts
    config.eval.enrich = "both"  # both | queries | gallery: the side whose texts they join

    if arm in ("vlm2vec", "head"):
        config.loss.negative_weight = "none"
        config.loss.mask_attributes = 2.0  # never
        config.data.lookalike_share = 0.0
    if arm == "head":
        config.loss.head_weight = 0.3
    if arm == "tiny":
        config.update(steps=6, batch=8, log_every=1, eval_every=3, checkpoint_every=3)
        common.tiny_rows(config)
        config.data.max_tokens = 48
        config.data.lookalike_share = 0.0  # all products would be compared first
        config.model.vocab_size = 512
        config.eval.tasks = "image+text->image+text"
    return config.lock()
