from afmrl_jax.core import progress


def test_a_long_wait_says_how_far_it_is(caplog, monkeypatch):
    for seconds, words in [(3600, []), (0, ["0 of 25 rows made", "10 of 25 rows made"])]:
        monkeypatch.setattr(progress, "SILENCE", seconds)
        with caplog.at_level("INFO", "afmrl_jax.core.progress"):
            starts = progress.with_progress(range(0, 25, 10), 25, "rows made")
            assert [next(starts), next(starts)] == [0, 10]
        assert caplog.messages == words
