"""Stage 1: the encoder, trained with attribute-guided contrastive learning.

configs/agcl.py           AGCL on the built-in catalogue, small enough for two CPU cores
configs/agcl.py:vlm2vec   the VLM2Vec baseline: the same code, weights and attribute masks off
configs/agcl.py:head      that baseline with a head beside it that learns the attributes as labels
"""

import math

from ml_collections import ConfigDict

from afmrl_jax.configs import common

ARMS = ("agcl", "vlm2vec", "head")


def get_config(arm: str = "agcl") -> ConfigDict:
    if arm not in ARMS:
        raise ValueError(f"there is no arm {arm!r}: it has {', '.join(ARMS)}")
    config = common.get_config()
    config.program = "agcl"
    config.steps = 400
    config.eval_every = 100
    config.checkpoint_every = 50

    config.batch = 64  # pairs of the global batch (VLM2Vec-V2: 1024)
    config.micro_batches = 1  # GradCache: pieces in which a batch is embedded; 1 = at once
    config.init_from = ""  # a checkpoint or a Hugging Face folder; "" = from scratch

    config.model = ConfigDict()
    # a name of models/presets.py: tiny | tiny_qwen2_5 | tiny_qwen3 | qwen2_vl_2b | qwen2_5_vl_3b
    config.model.preset = "tiny"  # | qwen3_vl_2b | ...; unused with init_from
    # of the computation; parameters and the loss stay float32. CPUs compute float32 faster;
    # accelerators bfloat16
    config.model.dtype = "float32"
    # what the backward pass computes again: nothing, all but products, all but attention, or all
    config.model.remat = "none"  # | dots | attention | full
    config.model.embedding_dim = 0  # first dimensions kept of the embedding; 0 = all
    # LoRA: narrow matrices are trained beside those of init_from, which stay as they are, stored in
    # model.dtype. VLM2Vec-V2 adds dropout .1 and DoRA, and Qwen's gate and up get none from it.
    config.model.lora_rank = 0  # 0 = all parameters are trained (VLM2Vec-V2: 16)
    config.model.lora_alpha = 32.0  # an adapter counts alpha / rank (VLM2Vec-V2: 64)
    # searched in kernels' paths, as layers.0.gate.kernel: the decoder's. "" = the tower's as well
    config.model.lora_targets = r"^layers\."  # VLM2Vec-V2's: ^layers.*(query|key|value|out|down)
    config.model.vocab_size = 4096  # of the tokenizer that `tiny` trains on its catalogue

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # adamw | muon (configs/sft.py)
    config.optimizer.learning_rate = 2e-3  # VLM2Vec-V2: 5e-5, from pretrained weights
    config.optimizer.warmup_share = 0.1  # of the steps; VLM2Vec-V2: 100 of 5,000
    config.optimizer.final_share = 0.02  # of the learning rate, where the cosine ends
    config.optimizer.weight_decay = 0.05  # matrices only
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.98
    config.optimizer.clip_norm = 1.0  # of the gradient; inf = not clipped

    config.data.workers = 1  # processes that prepare batches; 0 = in the training process
    config.data.timeout = 600.0  # seconds that a batch may take; then the run ends, saying where
    config.data.prompt = "plain"  # plain | chat: the model's chat template, as Qwen3-VL-Embedding's
    config.data.instruction = ""  # before each text; with chat, as the system ("" = its folder's)
    # a row's tokens, images included. Of too long a text the description goes first, then the end
    # of title and category, down to a quarter of the text's room, then attributes
    config.data.max_tokens = 96
    config.data.max_patches = 64  # a row's patches, over all its images
    config.data.min_pixels = 3136  # an image is enlarged to this area
    config.data.max_pixels = 4096  # and reduced to this one
    # what queries and targets show: views and their shares
    config.data.query_views = "image+text 0.9, image 0.05, text 0.05"
    config.data.target_views = "image+text 0.9, image 0.05, text 0.05"
    config.data.crop_area = 1.0  # least share of an image's area that a training crop keeps
    config.data.flip_share = 0.0  # of training images mirrored
    config.data.described_only = False  # training listings without attributes are left out
    # of training texts that carry the structured attributes: an encoder makes use of them in a
    # query only if it has seen them
    config.data.attribute_share = 0.7
    config.data.attribute_dropout = 0.3  # of those, attributes left out
    # of those, values replaced by those of another listing of its category: as often as the
    # generator will be wrong, so that the encoder trusts it as far as it may
    config.data.attribute_noise = 0.3
    # of a batch made of groups of look-alikes; 0 where most products have one listing
    config.data.lookalike_share = 0.25
    config.data.lookalike_group = 4  # products a group
    config.data.hard_negatives = 0  # listings of other products, mined for each query
    config.data.neighbours = 16  # look-alikes remembered of each product
    config.data.max_terms = 32  # attribute terms kept of a listing, the rarest first

    config.loss = ConfigDict()  # losses/contrastive.py; inf turns a mask off
    config.loss.temperature = 0.05  # VLM2Vec-V2: 0.02, from pretrained weights
    config.loss.negative_weight = "bm25"  # none | bm25 (AGCL) | similarity (LLaVE)
    config.loss.weight_scale = "self"  # self (by the query's own score) | raw (the paper's)
    config.loss.weight_strength = 1.0  # a in w = exp(a (1 + tanh B)); the paper: 1
    config.loss.similarity_strength = 9.0  # LLaVE's alpha, with negative_weight = similarity
    config.loss.boost_positive = True  # the paper weights the positive as well
    config.loss.mask_target_similarity = math.inf  # drop j if cos(d_j, d_i) above; RzenEmbed .95
    config.loss.mask_margin = math.inf  # drop j if s_ij > s_ii + this; UniME .1
    config.loss.mask_attributes = 0.95  # drop j if the attributes agree both ways above this
    config.loss.same_product = "drop"  # drop | positive | keep: other listings of the product
    config.loss.symmetric = True  # targets -> queries as well
    # losses/labels.py: beside the loss above a linear layer tells attributes from embeddings
    config.loss.head_weight = 0.0  # what its loss, in nats an attribute, counts; 0 = no such head
    config.loss.head_labels = 2048  # the most frequent pairs of name and value that it tells

    config.eval = ConfigDict()
    config.eval.tasks = "image+text->image+text, image->image, text->text, image->text, text->image"
    config.eval.batch = 128  # rows embedded at once
    config.eval.attributes = "none"  # | oracle: the catalogue's attributes join the texts
    config.eval.enrich = "both"  # both | queries | gallery: whose texts they join

    if arm in ("vlm2vec", "head"):
        config.loss.negative_weight = "none"
        config.loss.mask_attributes = math.inf
        config.data.lookalike_share = 0.0
    if arm == "head":
        config.loss.head_weight = 0.3
    return config.lock()
