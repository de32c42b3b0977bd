"""Fields that every program shares."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 0  # optimizer steps of the whole run
    config.log_every = 10  # steps
    config.eval_every = 0  # steps between validations; 0 = only at the end
    config.checkpoint_every = 0  # steps between checkpoints; 0 = only at the end
    config.checkpoint_dir = ""  # "" = WORKDIR/checkpoints; another folder, or gs://BUCKET/FOLDER
    config.profile = ""  # START:END, the steps to trace into WORKDIR/profile; "" = none

    config.mesh = ConfigDict()  # devices along each axis; -1 = what is left, on one axis
    config.mesh.slice = 1  # pods joined over the data-centre network
    config.mesh.data = -1  # replicas
    config.mesh.fsdp = 1  # replicas that share the parameters
    config.mesh.tensor = 1  # a matrix split over devices

    config.data = ConfigDict()
    config.data.path = "builtin"  # builtin, or folders, Parquet files, tfds:NAME, by commas
    # several catalogues: equal listing_ids with a photo in common are one listing, and equal
    config.data.shared_ids = True  # product_ids one product; False = each catalogue numbers its own
    # a JSONL of {"listing_id": ..., "attributes": {...}}, as annotate writes it: other attributes
    # than the catalogue's own, and none for a listing without a line; "" = the catalogue's own
    config.data.attributes = ""
    config.data.cache_dir = ""  # "" = $XDG_CACHE_HOME/afmrl_jax, or ~/.cache/afmrl_jax
    config.data.on_bad_listing = "error"  # error | skip (drop, count and list them)
    return config
