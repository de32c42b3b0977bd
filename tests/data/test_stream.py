import contextlib
import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from afmrl_jax.attributes.bm25 import CorpusStatistics
from afmrl_jax.catalog.listings import open_catalog
from afmrl_jax.core.errors import UserError
from afmrl_jax.core.fields import parse_mixture
from afmrl_jax.data.feed import Feed
from afmrl_jax.data.pairs import Composition, PairBatches, PairSampler
from afmrl_jax.data.processor import Processor, RowSizes
from afmrl_jax.data.stream import Stream, StreamOptions
from afmrl_jax.data.tokenizer import special_token_ids, train_tokenizer
from afmrl_jax.data.views import PARTS, VIEWS, Augmentation, TrainingViews
from afmrl_jax.data.workers import NICENESS
from afmrl_jax.models.presets import preset


@pytest.fixture(scope="module")
def batches(catalogue_folder, tmp_path_factory):
    catalog = open_catalog(catalogue_folder, cache_dir=tmp_path_factory.mktemp("cache"))
    tokenizer = train_tokenizer(["red mug", "blue shirt"] * 5, 300)
    config = preset("tiny").replace(
        vocab_size=tokenizer.get_vocab_size(), **special_token_ids(tokenizer)
    )
    products = 15
    neighbours = (np.arange(products)[:, None] + [1, 2]) % products
    mixture = parse_mixture("image+text 0.5, image 0.25, text 0.25", "views", VIEWS)
    return PairBatches(
        views=TrainingViews(catalog, Augmentation(0.6, 0.5, 0.5, 0.3, 0.1), others={}),
        sampler=PairSampler(catalog, "train", 8, Composition(0.5, 2, 1, 2, "keep"), 0, neighbours),
        processor=Processor(tokenizer, config, RowSizes(24, 16, 256, 1024)),
        statistics=CorpusStatistics.from_documents([{"color": "red", "type": "mug"}]),
        query_views=mixture,
        target_views=mixture,
        parts=parse_mixture("modalities 0.5, halves 0.5", "parts", PARTS),
        one_rendering=False,
        truth=catalog.products,
        max_terms=8,
        micro_batches=2,
        rows=np.arange(4),
        seed=0,
        steps=6,
    )


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_a_batch_is_chunks_of_examples_of_views(batches):
    batch = batches[0]
    assert batch["tokens"].shape == (2, 4, 3, 24)
    assert batch["patches"].shape[:4] == (2, 4, 3, 16)
    assert batch["terms"].shape == (2, 4, 3, 8)
    np.testing.assert_array_equal(batch["product"][..., 0], batch["product"][..., 1])
    assert (batch["product"][..., 0] != batch["product"][..., 2]).all()


def of_single_listings(batches, parts):
    """The batches of a feed without ids, without hard negatives; views are image+text."""
    catalog = Feed("listing", 0.5, 2, 1.0).with_ids(batches.views.catalog, 0)
    return dataclasses.replace(
        batches,
        views=dataclasses.replace(batches.views, catalog=catalog),
        sampler=PairSampler(catalog, "train", 8, Composition(0.0, 2, 0, 1, "keep"), 0, None),
        query_views=parse_mixture("image+text", "views", VIEWS),
        target_views=parse_mixture("image+text", "views", VIEWS),
        parts=parse_mixture(parts, "parts", PARTS),
        one_rendering=True,
    )


@pytest.mark.parametrize(
    "parts, photos, texts",
    [("modalities", {1}, {1}), ("halves", {2}, {2}), ("words", {2}, {2}), ("photo", {1}, {2})],
)
def test_a_pair_of_one_listing_shows_its_parts(batches, parts, photos, texts):
    """The number of sides that have a photo, and of those that have a text."""
    made = of_single_listings(batches, parts)
    batch = made[0]
    has_photo = (batch["patch_segments"] > 0).any(-1)  # [A, C, V]
    written = made.processor.tokenizer.decode_batch(batch["tokens"].reshape(16, -1))
    has_text = np.reshape([bool(text) for text in written], has_photo.shape)
    assert set(has_photo.sum(-1).flat) == photos
    assert set(has_text.sum(-1).flat) == texts
    assert has_photo.any((0, 1)).all() and has_text.any((0, 1)).all()  # the sides change places


def test_a_feed_without_ids_gives_ids_to_the_loss_and_products_to_its_statistics(batches):
    batch = of_single_listings(batches, "photo")[1]
    np.testing.assert_array_equal(batch["product"][..., 0], batch["product"][..., 1])
    assert len(np.unique(batch["product"][..., 0])) == 8  # listings
    products = batches.views.catalog.products[batch["listing"]]
    np.testing.assert_array_equal(batch["true_product"], products)


def test_two_processes_make_the_halves_of_one_process_s_batch(batches):
    single = of_single_listings(batches, "words 0.5, photo 0.5")
    for made in (batches, single):
        whole = made[3]
        halves = [dataclasses.replace(made, rows=rows)[3] for rows in np.arange(4).reshape(2, 2)]
        same(whole, {k: np.concatenate([h[k] for h in halves], axis=1) for k in whole})


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_from_one_integer_whatever_the_workers(batches, workers):
    stream = Stream(batches, 2, StreamOptions(workers, 100.0))
    try:
        for step in (2, 3, 4):
            assert stream.next_step == step
            same(next(stream), batches[step])
    finally:
        stream.close()


def test_a_worker_steps_back_for_its_trainer(batches):
    with contextlib.closing(Stream(batches, 0, StreamOptions(1, 100.0))) as stream:
        next(stream)
        [worker] = multiprocessing.active_children()
        assert os.getpriority(os.PRIO_PROCESS, worker.pid) == os.nice(0) + NICENESS


@dataclasses.dataclass(frozen=True)
class Troubled:
    """Batches of one number, of which the worker that makes `step` sleeps or is killed."""

    step: int
    killed: bool

    def __len__(self):
        return 100

    def __repr__(self):
        return "Troubled"

    def __getitem__(self, step):
        if step == self.step and self.killed:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self.step:
            time.sleep(1000)
        return {"listing": np.full((1, 1), step, np.int32)}


def take_all(stream):
    """Takes batches until there are no more; waits long for the first, for the workers to start."""
    try:
        for _ in stream:
            stream.timeout = 1
    finally:
        stream.close()


def test_a_worker_that_hangs_is_told_with_its_stack_and_all_are_ended(capfd):
    told = r"batch of step 3 .* data worker 1 of 2 \(process \d+\)"
    with pytest.raises(UserError, match=told):
        take_all(Stream(Troubled(2, killed=False), 0, StreamOptions(2, 100.0)))
    assert capfd.readouterr().err.count("in __getitem__\n") > 1
    assert not multiprocessing.active_children()


def test_a_killed_worker_is_told():
    """It reads ahead: what it had ready goes with it."""
    told = r"data worker 1 of 1, .* batch of step [456], was killed by SIGKILL"
    with pytest.raises(UserError, match=told):
        take_all(Stream(Troubled(5, killed=True), 3, StreamOptions(1, 100.0)))


def test_a_process_ends_though_its_own_thread_hangs():
    code = """
from test_stream import Stream, StreamOptions, Troubled, take_all
try:
    take_all(Stream(Troubled(1, killed=False), 0, StreamOptions(0, 100.0)))
except Exception as error:
    print(error)
"""
    paths = [str(Path(__file__).parent), os.environ["PYTHONPATH"]]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert "the batch of step 2 was not made within 1 s (data.timeout) by this" in done.stdout
    assert done.returncode == 0
