"""The reward-hacking watch: figures worked by hand, and verdicts."""

from dataclasses import replace

import pytest

from afmrl_jax.configs import rar
from afmrl_jax.core.errors import UserError
from afmrl_jax.rl.environment import Rollout
from afmrl_jax.rl.watch import WatchLimits, watch

LIMITS = WatchLimits.of(rar.get_config())
CALM = replace(LIMITS, answer_diversity=0.0, pair_diversity=0.0, copied=1.0, leaked=1.0)


def rollout(query, attributes, title="Red wool hat", ids=("hat-0012-3", "12"), reward=0.5):
    answer = "; ".join(f"{name}: {value}" for name, value in attributes.items())
    return Rollout(query, title, ids, answer, attributes, reward)


def test_copied_is_the_mean_share_of_an_answers_value_words_that_the_title_has():
    verdict = watch(
        [
            rollout(0, {"color": "RED", "material": "soft wool"}),  # 2 of 3, names don't count
            rollout(0, {"pattern": "plain"}),  # 0 of 1
            rollout(1, {"size": "1.5"}, title="a 1.5 litre jug"),  # 1 of 1
            Rollout(1, "Red hat", (), "red hat", {}, -0.1),  # no attributes: not counted
        ],
        CALM,
    )
    assert verdict.figures["copied"] == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert verdict.sentence == ""


def test_a_leaked_id_is_one_that_stands_in_the_answer_as_a_word():
    leaks = [
        rollout(0, {"model": "HAT-0012-3"}),
        rollout(0, {"model": "hat-0012-31"}),
        rollout(0, {"width": "12 cm"}),  # too short to be told from a number
        rollout(0, {"model": "0012"}),
    ]
    assert watch(leaks, CALM).figures["leaked"] == 1 / 4


def test_diversity_is_zero_when_all_queries_hear_the_same_and_one_when_nothing_is_shared():
    same = [rollout(query, {"color": "red", "type": "hat"}) for query in (0, 0, 1, 1, 2)]
    figures = watch(same, CALM).figures
    assert figures["answer_diversity"] == figures["pair_diversity"] == 0
    own = [rollout(query, {"color": f"c{query}", "type": f"t{query}"}) for query in (0, 0, 1, 2)]
    figures = watch(own, CALM).figures
    assert figures["answer_diversity"] == figures["pair_diversity"] == 1


def test_diversity_between_queries_does_not_hang_on_the_samples_of_one():
    # Query 0 has two answers, query 1 one that is among them: 2 / 1.5 - 1 = 1/3. Of pairs, query 0
    # has red, blue and hat, query 1 red and hat: 3 / 2.5 - 1 = .2.
    red, blue = {"color": "red", "type": "hat"}, {"color": "Blue ", "type": "hat"}
    few = [rollout(0, red), rollout(0, blue), rollout(1, red)]
    figures = watch(few, CALM).figures
    assert figures["answer_diversity"] == pytest.approx(1 / 3)
    assert figures["pair_diversity"] == pytest.approx(0.2)
    assert watch(few * 4, CALM).figures == pytest.approx(figures)


def test_one_query_alone_is_not_suspected_of_sameness():
    assert watch([rollout(0, {"color": "red"})], replace(LIMITS, copied=1.0)).sentence == ""


def test_the_verdict_names_the_limit_and_shows_the_rollouts_that_pass_it():
    honest = [rollout(q, {"color": f"shade {q}"}, reward=1.0) for q in range(8)]
    leak = rollout(8, {"model": "hat-0012-3"}, reward=0.9)
    verdict = watch([*honest, leak], replace(LIMITS, leaked=0.1))
    assert "0.111 of the answers hold an id of their own listing" in verdict.sentence
    assert "allowed is at most 0.1" in verdict.sentence
    assert "copied" not in verdict.sentence
    first = verdict.sentence.splitlines()[1]
    assert first == "  'Red wool hat' (hat-0012-3, 12) -> 'model: hat-0012-3', reward 0.9"
    assert watch([*honest, leak], replace(LIMITS, leaked=0.2)).sentence == ""


def test_the_same_answer_to_everything_is_suspected():
    verdict = watch([rollout(query, {"style": "new"}) for query in range(4)], LIMITS)
    assert "0 is the diversity of the answers to different queries" in verdict.sentence
    assert "allowed is at least 0.05" in verdict.sentence


def test_answers_that_do_not_help_held_out_queries_are_suspected():
    own = [rollout(query, {"color": f"shade {query}"}) for query in range(3)]
    assert watch(own, LIMITS, held_out_gain=0.0).sentence == ""
    verdict = watch(own, LIMITS, held_out_gain=-0.25)
    assert verdict.figures["held_out_gain"] == -0.25
    assert "-0.25 is what such answers gain on held-out queries" in verdict.sentence


def test_a_limit_outside_its_range_is_refused():
    with pytest.raises(UserError, match=r"watch\.copied is 90"):
        replace(LIMITS, copied=90)
