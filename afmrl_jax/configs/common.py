"""Fields that several programs share: a page calls the functions that it needs, then sets the
values that differ."""

from ml_collections import ConfigDict


def check_arm(arm: str, arms: tuple[str, ...]) -> None:
    """Raises ValueError, which names the arms, for an arm that a page does not have."""
    if arm not in arms:
        raise ValueError(f"there is no arm {arm!r}: it has {', '.join(arms)}")


def get_config() -> ConfigDict:
    """The fields of every program."""
    config = ConfigDict()
    # Devices along each axis. At most one axis is -1: it takes all devices that the others leave.
    config.mesh = ConfigDict()
    config.mesh.slice = 1  # pods joined over the data-centre network
    config.mesh.data = -1  # replicas
    config.mesh.fsdp = 1  # replicas that share the parameters
    config.mesh.tensor = 1  # devices that share a matrix

    config.data = ConfigDict()
    config.data.cache_dir = ""  # "" = $XDG_CACHE_HOME/afmrl_jax, or ~/.cache/afmrl_jax
    return config


def catalogue(config: ConfigDict) -> None:
    """The listings."""
    # builtin, or folders, Parquet files, tfds:NAME, by commas. world is what the base learned from.
    config.data.path = "builtin"
    # True: in several catalogues, listings with the same listing_id and a common photo are the same
    # listing, and the same product_id is the same product. False: each catalogue numbers its own.
    config.data.shared_ids = True
    config.data.on_bad_listing = "error"  # error | skip (leave out, count and list)
    # The built-in catalogue. A family is 4 to 6 products that resemble each other; a product has 2
    # to 6 listings. More families of one split leave the products of all others as they are.
    config.data.builtin = ConfigDict()
    config.data.builtin.train_families = 2000
    config.data.builtin.validation_families = 24  # benchmarks: 84
    config.data.builtin.test_families = 52  # benchmarks: 252, some 5,600 queries
    config.data.builtin.family_products = 6  # products at most of a family; 1 = no look-alikes
    # Bestsellers, which many sellers list: identical products meet in a batch.
    config.data.builtin.bestseller_share = 0.0  # share of the training products
    config.data.builtin.bestseller_listings = 6  # listings of each of these


def attributes(config: ConfigDict) -> None:
    """The attributes of the listings."""
    # A JSONL file of {"listing_id": ..., "attributes": {...}}, as annotate writes it. It replaces
    # the catalogue's attributes; a listing without a line then has none.
    config.data.attributes = ""  # "" = the catalogue's attributes


def schedule(config: ConfigDict, steps: int, evaluators: str) -> None:
    """How long a program trains, and how often it validates, saves and logs."""
    config.seed = 0
    config.steps = steps  # optimizer steps of the whole run
    config.log_every = 10  # steps between log lines
    config.eval_every = 0  # steps between validations; 0 = only at the end
    config.checkpoint_every = 0  # steps between checkpoints; 0 = only at the end
    config.checkpoint_dir = ""  # "" = WORKDIR/checkpoints; another folder, or gs://BUCKET/FOLDER
    # Evaluators of a validation, by commas: the program's, or module:function, yours. The first
    # number of the first evaluator chooses the best checkpoint.
    config.evaluators = evaluators
    config.profile = ""  # START:END, steps to trace into WORKDIR/profile; "" = none


def batches(config: ConfigDict) -> None:
    """How a program that trains prepares and divides its batches."""
    # The micro-batches of a batch are computed one after the other, with the same gradient.
    config.micro_batches = 1  # 1 = the whole batch at once
    config.data.workers = 1  # processes that prepare batches; 0 = a thread of the training process
    config.data.timeout = 600.0  # seconds to wait for a batch before the run ends


def model(config: ConfigDict) -> None:
    """How a model computes, and which of its parameters are trained."""
    config.model = ConfigDict()
    # The type of the computation; trained parameters and the loss are float32. CPUs are faster with
    # float32, accelerators with bfloat16.
    config.model.dtype = "float32"  # float32 | bfloat16
    # The backward pass recomputes nothing, all but matrix products, all but attention, or all.
    config.model.remat = "none"  # none | dots | attention | full
    # LoRA trains narrow matrices beside the pretrained ones, which are frozen and stored in dtype.
    # VLM2Vec-V2 takes rank 16, alpha 64 and ^layers.*(query|key|value|out|down), and adds dropout
    # .1 and DoRA.
    config.model.lora_rank = 0  # 0 = all parameters are trained
    config.model.lora_alpha = 32.0  # scale of an adapter: alpha / rank
    # A regular expression searched in kernels' paths, as layers.0.gate.kernel. This one selects the
    # decoder; "" selects the vision tower as well.
    config.model.lora_targets = r"^layers\."


def optimizer(config: ConfigDict, learning_rate: float) -> None:
    """Warm-up to the learning rate, then a cosine."""
    config.optimizer = ConfigDict()
    # From scratch Muon needs half as many steps as AdamW, each 15 to 30% slower on CPUs. Use AdamW
    # for pretrained weights and for LoRA.
    config.optimizer.name = "adamw"  # adamw | muon
    config.optimizer.learning_rate = learning_rate
    config.optimizer.warmup_share = 0.1  # share of the updates
    config.optimizer.final_share = 0.02  # share of the learning rate at the cosine's end
    config.optimizer.weight_decay = 0.05  # of matrices alone
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.98
    config.optimizer.clip_norm = 1.0  # greatest norm of the gradient; 0 = not clipped


def rows(config: ConfigDict, max_tokens: int) -> None:
    """The sizes of a model's inputs."""
    config.data.instruction = ""  # text that tells the model what to do
    config.data.max_tokens = max_tokens  # tokens of a row, images included
    config.data.max_patches = 64  # patches of a row, over all its images
    config.data.min_pixels = 3136  # area to which a smaller image is enlarged
    config.data.max_pixels = 4096  # area to which a larger image is reduced


def tiny_rows(config: ConfigDict) -> None:
    """The smallest useful inputs, prepared by the process that trains."""
    config.data.workers = 0
    config.data.max_patches = 16
    config.data.min_pixels = 256
    config.data.max_pixels = 1024
