"""Stage 2: the generator, taught to answer a listing with its attributes (SFT).

configs/sft.py        on the built-in catalogue, small enough for two CPU cores
configs/sft.py:tiny   a few steps, in seconds: shows the program, trains no good generator

To distil a larger model, let it write attributes (configs/annotate.py) and name them:
--config.data.attributes=FILE.
"""

from ml_collections import ConfigDict

from afmrl_jax.configs import common

ARMS = ("sft", "tiny")


def get_config(arm: str = "sft") -> ConfigDict:
    common.check_arm(arm, ARMS)
    config = common.get_config()
    config.program = "sft"
    common.catalogue(config)
    common.attributes(config)
    # 900 steps take four minutes; configs/cit.py takes 1,500.
    common.schedule(config, steps=900, evaluators="answers")
    config.eval_every = 500
    config.checkpoint_every = 250

    config.batch = 16  # answers of the global batch
    common.batches(config)
    config.micro_batches = 2  # micro-batches of 8 rows, which fit into a CPU's cache
    config.vocabulary_chunk = 16  # tokens of each row whose logits are in memory at once
    # A run of a generator or an encoder, a Hugging Face folder, or base, the model that ships with
    # the package (a folder of yours named so is ./base); "" = from scratch.
    config.init_from = ""

    common.model(config)
    # tiny | tiny_qwen2_5 | tiny_qwen3 | qwen2_5_vl_3b | ... (the paper: Qwen2.5-VL-3B)
    config.model.preset = "tiny"  # name in models/presets.py; unused with init_from
    config.model.vocab_size = 2048  # tokens of the tokenizer that a preset trains on its catalogue
    common.optimizer(config, learning_rate=4e-3)  # pretrained weights take 1e-5
    config.optimizer.name = "muon"

    common.rows(config, max_tokens=96)
    # The instruction is the system's turn of the chat template; "" keeps the template's turn.
    config.data.instruction = "List the product's key attributes."
    # Pairs that do not fit into an answer are not learned.
    config.data.max_answer = 52  # tokens of an answer
    # Rows of similar length make a batch, which is padded to one of a few lengths, each with its
    # compilation. Texts that differ more than those of the built-in catalogue take 4.
    config.data.buckets = 2  # lengths; 1 = the longest row's for all batches
    config.data.question_views = "image+text"  # views asked about, and their shares
    # RAR can reward a policy for leaving an attribute out only if the policy has done so before.
    config.data.answer_dropout = 0.15  # share of attributes left out of training answers
    # Other answers than all attributes, for a base (configs/pretrain.py); 0 = none of them.
    config.data.subset_share = 0.0  # share of answers with some attributes in random order
    config.data.subset_instruction = "Name some of the product's attributes."
    config.data.caption_share = 0.0  # share of answers that are the title of the photos
    config.data.caption_instruction = "Write the product's title."

    config.eval = ConfigDict()
    config.eval.batch = 128  # listings answered at once
    config.eval.validation_listings = 128  # listings of the validation split, at each validation
    config.eval.listings = 2000  # listings of the test split, at the end
    config.eval.samples = 3  # answers printed by each evaluation

    if arm == "tiny":
        config.update(steps=60, batch=8, log_every=10, eval_every=30, checkpoint_every=30)
        common.tiny_rows(config)
        config.data.max_tokens = 48
        config.data.max_answer = 24
        config.data.answer_dropout = 0.8  # short answers, which are learned soon
        config.model.vocab_size = 512
        config.eval.update(batch=16, validation_listings=16, listings=32)
    return config.lock()
