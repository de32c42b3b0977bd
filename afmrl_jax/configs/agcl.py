"""Stage 1: the encoder, trained with attribute-guided contrastive learning.

configs/agcl.py           AGCL on the built-in catalogue, small enough for two CPU cores
configs/agcl.py:vlm2vec   the VLM2Vec baseline: the same code, weights and attribute masks off
configs/agcl.py:head      that baseline with a head beside it that learns the attributes as labels
configs/agcl.py:tiny      a few steps of AGCL, in seconds: shows the program, trains no good encoder
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

    config.method = "agcl"  # agcl | distill (configs/distill.py), or module:Class, your objective
    config.batch = 64  # pairs of the global batch (VLM2Vec-V2: 1024)
    # GradCache divides a batch into micro-batches; the loss is of the whole batch all the same.
    common.batches(config)
    # A run, a Hugging Face folder, or base, the model that ships with the package (a folder of
    # yours named so is ./base); "" = from scratch.
    config.init_from = ""

    common.model(config)
    # tiny | tiny_qwen2_5 | tiny_qwen3 | qwen2_vl_2b | qwen2_5_vl_3b | qwen3_vl_2b | ...
    config.model.preset = "tiny"  # name in models/presets.py; unused with init_from
    config.model.embedding_dim = 0  # first dimensions kept of the embedding; 0 = all
    config.model.vocab_size = 4096  # tokens of the tokenizer that a preset trains on its catalogue
    common.optimizer(config, learning_rate=2e-3)  # VLM2Vec-V2: 5e-5, from pretrained weights

    # A text that is too long loses its description first, then the end of title and category, down
    # to a quarter of the text's room, then attributes.
    common.rows(config, max_tokens=96)
    # The prompt "plain" puts the instruction before each text. The prompt "chat" makes it the
    # system's turn of the model's chat template (Qwen3-VL-Embedding); "" keeps the template's turn.
    config.data.prompt = "plain"  # plain | chat
    config.data.query_views = "image+text 0.9, image 0.05, text 0.05"  # views and their shares
    config.data.target_views = "image+text 0.9, image 0.05, text 0.05"
    config.data.crop_area = 1.0  # least share of an image's area that a training crop keeps
    config.data.flip_share = 0.0  # share of training images that are mirrored
    # Which training listings are known to be the same product. product: those of one product_id.
    # listing: none, as in the paper; a pair is one listing. mixed: unmerged_share of the products
    # come under several ids, and a pair is of one id.
    config.data.identity = "product"  # product | listing | mixed
    config.data.unmerged_share = 0.5  # mixed: share of the products that have several ids
    config.data.ids_per_product = 2  # mixed: ids of each of these, at most one a listing
    # What the sides of a pair of one listing show. modalities: one the image, the other the text.
    # halves: each a random half of the words, some on both. words: each a half of the words, none
    # on both. photo: as words, and the photo on one side alone. A listing without photo or without
    # text takes the last of them.
    config.data.parts = "modalities 0.5, halves 0.5"  # modalities | halves | words | photo
    config.data.described_share = 1.0  # share of the training listings that keep their attributes
    config.data.described_only = False  # training listings without attributes are left out
    # An encoder makes use of attributes in a query only if it has seen them in training texts.
    config.data.attribute_share = 0.7  # share of training texts that carry the attributes
    config.data.attribute_dropout = 0.3  # share of those attributes that are left out
    # The encoder should trust attributes as far as they are true, so the share of wrong values in
    # training is about that of the generator.
    config.data.attribute_noise = 0.3  # share of values replaced by another listing's
    # Set it to 0 for a catalogue in which most products have one listing.
    config.data.lookalike_share = 0.25  # share of a batch's pairs in groups of look-alikes
    config.data.lookalike_group = 4  # products of a group
    config.data.hard_negatives = 0  # listings of other products, mined for each query
    config.data.neighbours = 16  # look-alikes kept of each product
    # Look-alikes that agree in all attributes may be the same product. keep leaves that to the
    # masks; without ids these come first, so take larger groups. With drop a product and its
    # look-alikes all differ.
    config.data.agreeing_neighbours = "keep"  # keep | drop
    config.data.max_terms = 32  # attribute terms kept of a listing, the rarest first
    # Method distill: Parquet files, or folders of them, with listing_id and vector, and the
    # teachers' shares: "titles.parquet 0.7, photos/ 0.3". A teacher may lack listings.
    config.data.teachers = ""

    config.loss = ConfigDict()  # losses/contrastive.py
    config.loss.temperature = 0.05  # VLM2Vec-V2: 0.02, from pretrained weights
    config.loss.negative_weight = "bm25"  # none (InfoNCE) | bm25 (AGCL) | similarity (LLaVE)
    config.loss.weight_scale = "self"  # self (score of the query with itself) | raw (the paper's)
    config.loss.weight_strength = 1.0  # a in w = exp(a (1 + tanh B)); the paper: 1
    config.loss.similarity_strength = 9.0  # LLaVE's alpha, with negative_weight = similarity
    config.loss.boost_positive = True  # whether the positive is weighted too, as in the paper
    # A mask is off where no candidate can exceed its threshold: 2 for cosines, 1 for agreements.
    config.loss.mask_target_similarity = 2.0  # drop j if cos(d_j, d_i) is above; RzenEmbed .95
    config.loss.mask_margin = 2.0  # drop j if s_ij > s_ii + this; UniME .1
    config.loss.mask_attributes = 0.95  # drop j if attributes agree above, both ways
    config.loss.same_product = "drop"  # drop | positive | keep: other listings of the product
    config.loss.symmetric = True  # whether targets look for queries too
    # Cross-batch memory: targets of past batches are further negatives of the queries (MOON).
    config.loss.memory_batches = 0  # past batches whose targets are kept; 0 = none
    # losses/labels.py: a linear layer predicts attributes from embeddings, as a second loss.
    config.loss.head_weight = 0.0  # weight of its loss, in nats an attribute; 0 = no head
    config.loss.head_labels = 2048  # labels at most, the most frequent pairs of name and value
    # losses/distill.py: cosines are pulled to the teachers', and so are a batch's rankings.
    config.loss.ranking_weight = 0.1  # weight of the rankings; 0 = the cosines alone

    config.eval = ConfigDict()
    config.eval.tasks = "image+text->image+text, image->image, text->text, image->text, text->image"
    config.eval.batch = 128  # rows embedded at once
    config.eval.attributes = "none"  # none | oracle: attributes added to the texts
    config.eval.enrich = "both"  # both | queries | gallery: side whose texts have them

    if arm in ("vlm2vec", "head"):
        config.loss.negative_weight = "none"
        config.loss.mask_attributes = 2.0  # mask off
        config.data.lookalike_share = 0.0
    if arm == "head":
        config.loss.head_weight = 0.3
    if arm == "tiny":
        config.update(steps=6, batch=8, log_every=1, eval_every=3, checkpoint_every=3)
        common.tiny_rows(config)
        config.data.max_tokens = 48
        config.data.lookalike_share = 0.0  # no comparison of all products before the first step
        config.model.vocab_size = 512
        config.eval.tasks = "image+text->image+text"
    return config.lock()
