"""Stage 3: the generator, rewarded for attributes that find the identical product (RAR).

python -m afmrl_jax.main --config=configs/rar.py --workdir=W/rar
--config.generator=W/sft --config.encoder=W/agcl

configs/rar.py        on the built-in catalogue, small enough for two CPU cores
configs/rar.py:tiny   a few steps, in seconds, with what the other tiny arms have trained

An encoder that never saw attributes makes little of them: train it with data.attribute_share above
0 (configs/agcl.py).
"""

from ml_collections import ConfigDict

from afmrl_jax.configs import common

ARMS = ("rar", "tiny")


def get_config(arm: str = "rar") -> ConfigDict:
    common.check_arm(arm, ARMS)
    config = common.get_config()
    config.program = "rar"
    common.catalogue(config)
    common.attributes(config)
    common.schedule(config, steps=80, evaluators="held_out")
    config.log_every = 1
    config.eval_every = 16  # the checkpoint that is best then is the one that is judged and used
    config.checkpoint_every = 10

    config.generator = ""  # SFT's workdir, one of its checkpoints, or a Hugging Face folder
    config.encoder = ""  # AGCL's workdir, one of its checkpoints, or a folder exported from it

    config.queries = 16  # queries of a step, over all processes
    config.samples = 8  # answers to each query
    config.temperature = 1.0  # of the distribution that answers are drawn from
    common.batches(config)  # of the queries in an update
    config.data.workers = 0
    config.inner_epochs = 1  # updates by the answers of one step
    config.vocabulary_chunk = 16  # tokens of each row whose logits are in memory at once
    config.rollouts_every = 16  # queries of which one is written to rollouts.jsonl; 0 = none

    config.reward = ConfigDict()  # rl/rewards.py
    # From coarse to fine: recall, the paper's, then mrr, ndcg and margin. Hardly a group of answers
    # has equal nDCG. No group has equal margins, but a wider margin on average finds no more first.
    config.reward.kind = "ndcg"  # recall | mrr | ndcg | margin
    config.reward.k = 50  # ranks of recall and ndcg; fewer for a small gallery
    config.reward.gain = False  # whether the measure without attributes is subtracted
    config.reward.invalid = -0.02  # reward of an answer in an invalid format (the paper: -0.1)
    config.reward.length_cost = 0.0  # cost of a token
    config.reward.gallery = 5_000  # training listings searched, whole products of a larger split
    # With attributes in the gallery, the catalogue's or those of data.attributes join its texts, in
    # training and for held-out queries.
    config.reward.gallery_attributes = False
    config.reward.batch = 144  # rows embedded at once; queries x (samples + 1) make one step's

    config.policy = ConfigDict()  # losses/policy.py
    config.policy.objective = "grpo"  # grpo | dr_grpo
    config.policy.clip = 0.2  # c of the clipped ratio
    config.policy.kl = 0.03  # weight of the divergence from the generator of the beginning
    config.policy.mask_truncated = False  # whether answers cut at max_answer are left out

    # The run stops where a figure passes its limit, which looks like reward hacking: rl/watch.py.
    config.watch = ConfigDict()
    config.watch.copied = 0.9  # at most: share of the words of an answer's values in its title
    config.watch.leaked = 0.02  # at most: share of answers that hold their listing's id
    # Diversity is 0 where all queries get the same, and 1 where they share nothing.
    config.watch.answer_diversity = 0.05  # at least: of whole answers
    config.watch.pair_diversity = 0.01  # at least: of pairs "name: value"
    # Compared with no attributes, or with those before training where these do harm.
    config.watch.held_out_gain = -0.1  # at least: gain of held-out queries by their attributes

    common.model(config)
    common.optimizer(config, learning_rate=3e-4)  # pretrained weights take 1e-6
    config.optimizer.final_share = 0.1
    config.optimizer.weight_decay = 0.0

    # A generator that was trained here has these sizes already, and they do not count; they say how
    # to ask a Hugging Face folder.
    common.rows(config, max_tokens=104)  # a question's
    config.data.instruction = "List the product's key attributes."
    config.data.max_answer = 56  # tokens of an answer

    config.eval = ConfigDict()
    config.eval.batch = 128  # listings answered at once
    # Queries of the validation split also choose how sure of a pair a generator must be
    # (rl/held_out.py).
    config.eval.validation_listings = 480  # queries at each validation
    config.eval.listings = 2000  # queries of the test split at the end

    if arm == "tiny":
        config.update(steps=3, queries=4, samples=4, eval_every=0, checkpoint_every=2)
        config.update(rollouts_every=1)
        config.reward.update(gallery=200, batch=20)
        # So small a generator says the same of everything.
        config.watch.update(copied=1.0, answer_diversity=0.0, pair_diversity=0.0)
        config.watch.held_out_gain = -2.0
        config.eval.update(batch=16, validation_listings=16, listings=32)
    return config.lock()
