"""The whole cycle (CIT): an encoder and a generator, each trained by means of the other.

python -m afmrl_jax.main --config=configs/cit.py --workdir=W/cit

Every stage has the fields of its own file, as --config.rar.steps=50, less those that are said once
for all and those that the cycle sets. The same command again goes on where the last one stopped. To
run a stage anew, delete its folder and those of the stages after it.

configs/cit.py:tiny takes every stage's tiny arm: the whole cycle in a minute or two, to see it run.
"""

from types import ModuleType

from ml_collections import ConfigDict

from afmrl_jax.configs import agcl, annotate, common, evaluate, rar, sft

ARMS = ("cit", "tiny")
# Fields that are said once for all stages.
SHARED = ("program", "seed", "mesh", "data.path", "data.shared_ids", "data.attributes")
SHARED += ("data.cache_dir", "data.on_bad_listing")
# A model that was trained here knows its rows.
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
    # The share of the training products that are annotated, and that `again` learns from.
    config.share = 0.4

    def stage(page: ModuleType, *taken: str) -> ConfigDict:
        """The fields of a stage's page, less those shared and those `taken`."""
        fields = (page.get_config("tiny") if arm == "tiny" else page.get_config()).unlock()
        for name in (*SHARED, *taken):
            section, _, field = name.rpartition(".")
            part = fields[section] if section else fields
            if field in part:
                del part[field]
        return fields

    config.agcl = stage(agcl)  # the first encoder
    config.sft = stage(sft)  # the generator. init_from may be agcl: the encoder of this cycle
    config.rar = stage(rar, "generator", "encoder", *ROWS)
    config.annotate = stage(annotate, "generator", "split", "share", *ENDPOINT)
    # The second encoder. Its init_from may be agcl: then it goes on from the first one.
    config.again = stage(agcl)
    taken = ("checkpoint", "model", "eval.attributes", "eval.enrich", "data.prompt")
    config.evaluate = stage(evaluate, *taken, *ROWS)

    config.again.data.described_only = True
    config.again.data.attribute_noise = 0.0  # what the generator says is wrong often enough
    task = "image+text->image+text"
    config.agcl.eval.tasks = config.again.eval.tasks = config.evaluate.eval.tasks = task
    if arm == "tiny":
        config.share = annotate.get_config("tiny").share
    else:  # the whole takes 35 minutes on two CPU cores
        config.agcl.steps = config.again.steps = 240
        config.sft.steps = 1500  # more than four minutes
    return config.lock()
