"""Stage 2: the generator, taught to answer a listing with its attributes (SFT).

On the built-in catalogue, small enough for two CPU cores. To distil a larger model, let it write
attributes (configs/annotate.py) and name them: --config.data.attributes=FILE.
"""

from ml_collections import ConfigDict

from afmrl_jax.configs import common


def get_config() -> ConfigDict:
    config = common.get_config()
    config.program = "sft"
    config.steps = 900  # four minutes; configs/cit.py takes 1,500
    config.eval_every = 500
    config.checkpoint_every = 250

    config.batch = 16  # answers of the global batch
    # micro-batches in which it is computed, with the same gradient; 1 = at once. 8 rows at a time
    # stay in a CPU's cache
    config.micro_batches = 2
    config.vocabulary_chunk = 16  # tokens of each row whose logits are in memory at once
    # a checkpoint, of an encoder too, which has learnt to see, or a Hugging Face folder; "" = from
    # scratch
    config.init_from = ""

    config.model = ConfigDict()
    # a name of models/presets.py: tiny | tiny_qwen2_5 | tiny_qwen3 | qwen2_5_vl_3b | ...
    config.model.preset = "tiny"  # unused with init_from (the paper: Qwen2.5-VL-3B)
    # of the computation; parameters and the loss stay float32. CPUs compute float32 faster;
    # accelerators bfloat16
    config.model.dtype = "float32"
    # what the backward pass computes again: nothing, all but products, all but attention, or all
    config.model.remat = "none"  # | dots | attention | full
    # LoRA: narrow matrices are trained beside those of init_from, which stay as they are, stored in
    # model.dtype.
    config.model.lora_rank = 0  # 0 = all parameters are trained, as the paper's
    config.model.lora_alpha = 32.0  # an adapter counts alpha / rank
    # searched in kernels' paths, as layers.0.gate.kernel: the decoder's. "" = the tower's as well
    config.model.lora_targets = r"^layers\."
    config.model.vocab_size = 2048  # of the tokenizer that a preset trains on its catalogue

    config.optimizer = ConfigDict()
    # adamw | muon. From scratch muon needs half of the steps, 15 to 30% dearer on CPUs; pretrained
    # weights, and LoRA's narrow matrices, take adamw
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 4e-3  # from scratch; pretrained weights take 1e-5
    config.optimizer.warmup_share = 0.1  # of the steps
    config.optimizer.final_share = 0.02  # of the learning rate, where the cosine ends
    config.optimizer.weight_decay = 0.05  # matrices only
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.98
    config.optimizer.clip_norm = 1.0  # of the gradient; inf = not clipped

    config.data.workers = 1  # processes that prepare batches; 0 = in the training process
    config.data.timeout = 600.0  # seconds that a batch may take; then the run ends, saying where
    # said as the system of the model's chat template; "" = the template's own words
    config.data.instruction = "List the product's key attributes."
    config.data.max_tokens = 96  # a question's tokens, images included
    config.data.max_answer = 52  # an answer's; pairs that it does not hold are not learned
    # how many lengths batches, of rows of like length, are padded to; a compilation each. Texts
    # that differ more than the built-in catalogue's take 4; 1 = all rows padded to the longest
    config.data.buckets = 2
    # share of the attributes that answers to learn from leave out, at random: a policy that has
    # never left one out cannot be rewarded for it (RAR)
    config.data.answer_dropout = 0.15
    config.data.max_patches = 64  # a row's patches, over all its images
    config.data.min_pixels = 3136  # an image is enlarged to this area
    config.data.max_pixels = 4096  # and reduced to this one

    config.eval = ConfigDict()
    config.eval.batch = 128  # listings answered at once
    config.eval.validation_listings = 128  # answered at each validation, of that split
    config.eval.listings = 2000  # answered at the end, of the test split
    config.eval.samples = 3  # answers shown of each evaluation
    return config.lock()
