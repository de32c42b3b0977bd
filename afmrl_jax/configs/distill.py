"""A small encoder from vectors that large ones made of the same listings, whichever they are.

configs/distill.py        from the base that ships, on the built-in catalogue
configs/distill.py:tiny   a few steps, in seconds: shows the program, trains no good encoder

The program is that of configs/agcl.py. Give --config.data.teachers; no product ids are needed.
"""

from ml_collections import ConfigDict

from afmrl_jax.configs import agcl, common

ARMS = ("distill", "tiny")


def get_config(arm: str = "distill") -> ConfigDict:
    common.check_arm(arm, ARMS)
    config = agcl.get_config("tiny" if arm == "tiny" else "vlm2vec").unlock()
    config.method = "distill"
    config.data.identity = "listing"
    # The student is to place a listing alike whatever of it is shown.
    config.data.parts = "modalities 0.5, halves 0.5"
    config.data.crop_area = 0.5
    config.data.attribute_share = 0.0
    if arm == "distill":
        config.init_from = "base"
        config.steps = 200
    return config.lock()
