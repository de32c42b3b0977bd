"""The whole cycle (CIT): an encoder and a generator, each trained with the help of the other.

python -m afmrl_jax.main --config=configs/cit.py --workdir=W/cit

Every stage has the fields of its page, as --config.rar.steps=50, without those that all stages
share and those that the cycle sets. The same command again goes on where the last one stopped. To
run a stage anew, delete its folder and those of the stages after it.

configs/cit.py:tiny takes every stage's tiny arm: the whole cycle runs in a minute or two.
"""

from types import ModuleType

from ml_collections import ConfigDict

from afmrl_jax.configs import agcl, annotate, common, evaluate, rar, sft

ARMS = ("cit", "tiny")
# Fields that all stages share.
SHARED = ("program", "seed", "mesh", "data.path", "data.shared_ids", "data.attributes")
SHARED += ("data.cache_dir", "data.on_bad_listing", "data.builtin")
# Fields that a model trained here brings with it.
ROWS = ("data.instruction", "data.max_tokens", "data.max_answer", "data.max_patches")
ROWS += ("data.min_pixels", "data.max_pixels")
ENDPOINT = ("prompt", "images", "image_side", "text_characters", "api", "budget")


def get_config(arm: str = "cit") -> ConfigDict:
    common.check_arm(arm, ARMS)
    config = common.get_config()
    config.program = "cit"
    config.seed = 0
    common.catalogue(config)
    common.attributes(config)
    # The stage `again` learns from the annotated products.
    config.share = 0.4  # share of the training products that are annotated

    def stage(page: ModuleType, *removed: str) -> ConfigDict:
        """The fields of a stage's page without those shared and those of `removed`."""
        fields = (page.get_config("tiny") if arm == "tiny" else page.get_config()).unlock()
        for name in (*SHARED, *removed):
            section, _, field = name.rpartition(".")
            part = fields[section] if section else fields
            if field in part:
                del part[field]
        return fields

    config.agcl = stage(agcl)  # the first encoder
    # The generator. Its init_from may be agcl: then it starts from the first encoder.
    config.sft = stage(sft)
    config.rar = stage(rar, "generator", "encoder", *ROWS)
    config.annotate = stage(annotate, "generator", "split", "share", *ENDPOINT)
    # The second encoder. Its init_from may be agcl: then it starts from the first encoder.
    config.again = stage(agcl)
    removed = ("checkpoint", "model", "eval.attributes", "eval.enrich", "data.prompt")
    config.evaluate = stage(evaluate, *removed, *ROWS)

    config.again.data.described_only = True
    # The generator's attributes are wrong often enough.
    config.again.data.attribute_noise = 0.0
    task = "image+text->image+text"
    config.agcl.eval.tasks = config.again.eval.tasks = config.evaluate.eval.tasks = task
    if arm == "tiny":
        config.share = annotate.get_config("tiny").share
    else:  # 35 minutes for the whole cycle on two CPU cores
        # All begin with the base that ships with the package, the generator with smaller steps.
        config.agcl.init_from = config.sft.init_from = config.again.init_from = "base"
        config.sft.optimizer.learning_rate = 1e-3
        config.agcl.steps = config.again.steps = 240
        config.sft.steps = 900
    return config.lock()
