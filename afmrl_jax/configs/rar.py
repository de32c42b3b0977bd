"""Stage 3: the generator, rewarded for attributes with which the same product is found (RAR).

python -m afmrl_jax.main --config=configs/rar.py --workdir=W/rar
--config.generator=W/sft --config.encoder=W/agcl

configs/rar.py        on the built-in catalogue, small enough for two CPU cores
configs/rar.py:tiny   a few steps, in seconds, with the models of the other tiny arms

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
    # The best checkpoint at these validations is judged at the end, and other programs use it.
    config.eval_every = 16
    config.checkpoint_every = 10

    config.generator = ""  # SFT's workdir, one of its checkpoints, or a Hugging Face folder
    config.encoder = ""  # AGCL's workdir, one of its checkpoints, or a folder exported from it

    config.queries = 16  # queries of a step, over all processes
    config.samples = 8  # answers to each query
    config.temperature = 1.0  # temperature at which answers are drawn
    common.batches(config)
    config.data.workers = 0
    config.inner_epochs = 1  # updates with the answers of a step
    config.vocabulary_chunk = 16  # tokens of each row whose logits are in memory at once
    config.rollouts_every = 16  # queries for each one written to rollouts.jsonl; 0 = none

    config.reward = ConfigDict()  # rl/rewards.py
    # From coarse to fine: recall (the paper's), mrr, ndcg, margin. Few groups of answers have equal
    # nDCG. No group has equal margins, but a wider mean margin does not rank more products first.
    config.reward.kind = "ndcg"  # recall | mrr | ndcg | margin; what held-out queries gain is of it
    # A function of your own, as "my_rewards:brand_found" (CONTRIBUTING.md); "": the measure `kind`.
    config.reward.function = ""
    config.reward.k = 50  # ranks of recall and ndcg; fewer for a small gallery
    config.reward.gain = False  # whether the reward without attributes is subtracted
    config.reward.invalid = -0.02  # reward of an answer in an invalid format (the paper: -0.1)
    config.reward.length_cost = 0.0  # cost of a token
    config.reward.gallery = 5_000  # training listings to search, whole products at random
    # True: the gallery's texts have attributes, the catalogue's or those of data.attributes, in
    # training and for held-out queries.
    config.reward.gallery_attributes = False
    # A step embeds queries x (samples + 1) rows.
    config.reward.batch = 144  # rows embedded at once

    config.policy = ConfigDict()  # losses/policy.py
    config.policy.objective = "grpo"  # grpo | dr_grpo
    config.policy.clip = 0.2  # c of the clipped ratio
    config.policy.kl = 0.03  # weight of the divergence from the generator of the beginning
    config.policy.mask_truncated = False  # whether answers cut at max_answer are left out
    # answer: all tokens of an answer have its advantage. pairs: those of each pair have what the
    # pair adds to the rewards of its query's answers, by a ridge regression (rl/credit.py). It is a
    # third as large, so that kl holds back three times as much.
    config.policy.credit = "answer"  # answer | pairs
    config.policy.credit_ridge = 1.0  # strength of the ridge, in answers
    # Answers of a step whose pairs are each left out and searched for without, to compare that with
    # the regression: metric credit_correlation; 0 = none.
    config.policy.credit_checks = 0

    # The run stops where a figure passes its limit, a sign of reward hacking (rl/watch.py).
    config.watch = ConfigDict()
    config.watch.copied = 0.9  # most: share of the words of an answer's values in its title
    config.watch.leaked = 0.02  # most: share of answers that hold their listing's id
    # Diversity is 0 where all queries get the same answer, and 1 where answers share nothing.
    config.watch.answer_diversity = 0.05  # least: diversity of whole answers
    config.watch.pair_diversity = 0.01  # least: diversity of pairs "name: value"
    # The gain is over no attributes; over those before training where these do harm.
    config.watch.held_out_gain = -0.1  # least: gain of held-out queries by their attributes

    common.model(config)
    common.optimizer(config, learning_rate=3e-4)  # pretrained weights take 1e-6
    config.optimizer.final_share = 0.1
    config.optimizer.weight_decay = 0.0

    # These are for a generator from a Hugging Face folder. A generator that was trained here has
    # its sizes already.
    common.rows(config, max_tokens=104)
    config.data.instruction = "List the product's key attributes."
    config.data.max_answer = 56  # tokens of an answer

    config.eval = ConfigDict()
    config.eval.batch = 128  # listings answered at once
    # The validation queries also choose the confidence that a pair needs to be used
    # (rl/held_out.py).
    config.eval.validation_listings = 480  # queries of each validation
    config.eval.listings = 2000  # queries of the test split at the end

    if arm == "tiny":
        config.update(steps=3, queries=4, samples=4, eval_every=0, checkpoint_every=2)
        config.update(rollouts_every=1)
        config.reward.update(gallery=200, batch=20)
        # So small a generator gives the same answer to all listings.
        config.watch.update(copied=1.0, answer_diversity=0.0, pair_diversity=0.0)
        config.watch.held_out_gain = -2.0
        config.eval.update(batch=16, validation_listings=16, listings=32)
    return config.lock()
