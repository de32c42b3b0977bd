"""Stage 3: the generator, rewarded for attributes that find the identical product (RAR).

python -m afmrl_jax.main --config=configs/rar.py --workdir=W/rar
--config.generator=W/sft --config.encoder=W/agcl

On the built-in catalogue, small enough for two CPU cores. An encoder that never saw attributes
makes little of them: train it with data.attribute_share above 0 (configs/agcl.py).
"""

from ml_collections import ConfigDict

from afmrl_jax.configs import common


def get_config() -> ConfigDict:
    config = common.get_config()
    config.program = "rar"
    config.steps = 80
    config.log_every = 1
    config.eval_every = 16  # the checkpoint that does best then is the one that is judged and used
    config.checkpoint_every = 10

    config.generator = ""  # SFT's workdir, one of its checkpoints, or a Hugging Face folder
    config.encoder = ""  # AGCL's workdir, one of its checkpoints, or a folder exported from it

    config.queries = 16  # of a step, all processes'
    config.samples = 8  # answers to each query
    config.temperature = 1.0  # at which they are drawn
    # of queries in an update, with the same gradient; 1 = at once
    config.micro_batches = 1
    config.inner_epochs = 1  # updates by the answers of one step
    config.vocabulary_chunk = 16  # tokens of each row whose logits are in memory at once
    config.rollouts_every = 16  # a group of this many is written to rollouts.jsonl; 0 = none

    config.reward = ConfigDict()  # rl/rewards.py
    # recall (the paper's) | mrr | ndcg | margin, from coarse to fine. nDCG has hardly a group
    # without variance; margins have none, but what widens them on average finds no more first
    config.reward.kind = "ndcg"
    config.reward.k = 50  # of recall and ndcg; less for a small gallery
    config.reward.gain = False  # less what the query finds without attributes
    config.reward.invalid = -0.02  # of an answer in an invalid format (the paper: -0.1)
    config.reward.length_cost = 0.0  # a token
    config.reward.gallery = 5_000  # training listings searched, whole products of a larger split
    # the catalogue's attributes, or data.attributes', join the texts of every gallery: those that
    # training searches and those of held-out queries
    config.reward.gallery_attributes = False
    config.reward.batch = 144  # rows embedded at once; queries x (samples + 1) is one step's

    config.policy = ConfigDict()  # losses/policy.py
    config.policy.objective = "grpo"  # grpo | dr_grpo
    config.policy.clip = 0.2
    config.policy.kl = 0.03  # weight of the divergence from the generator that it began with
    config.policy.mask_truncated = False  # answers cut at max_answer are left out of the loss

    config.watch = ConfigDict()  # rl/watch.py: where the run stops, suspecting reward hacking
    config.watch.copied = 0.9  # at most: of the words of an answer's values, from its title
    config.watch.leaked = 0.02  # at most: of answers that hold their listing's id
    config.watch.answer_diversity = 0.05  # at least: 0 the same to all queries, 1 nothing shared
    config.watch.pair_diversity = 0.01  # at least: the same of pairs "name: value"
    # at least: what attributes add to held-out queries; where those before training lose, to these
    config.watch.held_out_gain = -0.1

    config.model = ConfigDict()
    # of the computation; trained parameters stay float32. CPUs compute float32 faster;
    # accelerators bfloat16
    config.model.dtype = "float32"
    # what the backward pass computes again: nothing, all but products, all but attention, or all
    config.model.remat = "none"  # | dots | attention | full
    config.model.lora_rank = 0  # 0 = all parameters are trained, as the paper's
    config.model.lora_alpha = 32.0  # an adapter counts alpha / rank
    # searched in kernels' paths, as layers.0.gate.kernel: the decoder's. "" = the tower's as well
    config.model.lora_targets = r"^layers\."

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # adamw | muon (configs/sft.py)
    config.optimizer.learning_rate = 3e-4  # pretrained weights take 1e-6
    config.optimizer.warmup_share = 0.1  # of the updates
    config.optimizer.final_share = 0.1  # of the learning rate, where the cosine ends
    config.optimizer.weight_decay = 0.0  # matrices only
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.98
    config.optimizer.clip_norm = 1.0  # of the gradient; inf = not clipped

    config.data.workers = 0  # processes that prepare queries; 0 = in the training process
    config.data.timeout = 600.0  # seconds that a batch may take; then the run ends, saying where
    # How to ask a Hugging Face folder; a run knows this itself, and these fields then do not count.
    config.data.instruction = "List the product's key attributes."
    config.data.max_tokens = 104  # a question's tokens, images included
    config.data.max_answer = 56  # an answer's
    config.data.max_patches = 64  # a row's patches, over all its images
    config.data.min_pixels = 3136  # an image is enlarged to this area
    config.data.max_pixels = 4096  # and reduced to this one

    config.eval = ConfigDict()
    config.eval.batch = 128  # listings answered at once
    # that ask at each validation, of that split; by them it is chosen how sure of a pair a
    # generator must be (rl/held_out.py)
    config.eval.validation_listings = 480
    config.eval.listings = 2000  # that ask at the end, of the test split
    return config.lock()
