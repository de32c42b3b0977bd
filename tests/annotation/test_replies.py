import email.utils
import json

import pytest

from afmrl_jax.annotation.replies import Kind, read_reply

PLAIN = {"role": "assistant", "content": "color: red; material: co"}


def reply(payload, status=200, headers=None):
    return read_reply(status, headers or {}, json.dumps(payload).encode(), lambda text: text)


def completion(message=PLAIN, **choice):
    return reply({"choices": [{"message": message, **choice}]})


@pytest.mark.parametrize("end", ["stop", "eos_token", "stop_sequence", "end_turn", "STOP"])
def test_an_answer_that_ended_by_itself_is_whole(end):
    read = completion(finish_reason=end)
    assert read.kind is Kind.ANSWERED and read.closed and read.text == PLAIN["content"]


@pytest.mark.parametrize("end", ["length", "MAX_TOKENS", "model_context_window_exceeded"])
def test_an_answer_that_met_the_limit_is_cut(end):
    read = completion(finish_reason=end)
    assert read.kind is Kind.ANSWERED and not read.closed


@pytest.mark.parametrize(
    "end", ["content_filter", "SAFETY", "tool_calls", "function_call", "repetition", "", None, 1]
)
def test_what_a_filter_a_tool_or_an_unknown_cause_stopped_is_no_answer(end):
    read = completion(finish_reason=end)
    assert read.kind is Kind.STOPPED and "finish_reason" in read.reason
    assert completion().kind is Kind.STOPPED  # where the field is absent too


@pytest.mark.parametrize("end", ["abort", "error", "load", "network_error", "timeout"])
def test_what_the_server_broke_off_may_be_asked_again(end):
    assert completion(finish_reason=end).kind is Kind.FAILED


@pytest.mark.parametrize(
    "content, text",
    [
        ([{"type": "text", "text": "a: "}, {"type": "text", "text": "b"}], "a: b"),
        ([{"type": "thinking", "thinking": "x"}, {"type": "text", "text": "a: b"}], "a: b"),
        ([], ""),
        (None, ""),  # what a limit leaves that comes while the model thinks
    ],
)
def test_the_parts_of_a_message_are_read_as_one_text(content, text):
    message = {"content": content, "reasoning_content": "color: blue"}
    read = completion(message, finish_reason="stop")
    assert read.kind is Kind.ANSWERED and read.text == text


@pytest.mark.parametrize(
    "content", [5, {"a": "b"}, [{"type": "text"}], [{"type": "text", "text": 1}]]
)
def test_what_is_no_text_is_not_read(content):
    assert completion({"content": content}, finish_reason="stop").kind is Kind.UNREADABLE


def test_a_refusal_beside_the_text_is_no_answer():
    read = completion({**PLAIN, "refusal": "I can't help."}, finish_reason="stop")
    assert read.kind is Kind.STOPPED and "I can't help." in read.reason
    assert completion({**PLAIN, "refusal": None}, finish_reason="stop").kind is Kind.ANSWERED


@pytest.mark.parametrize(
    "status, body, kind",
    [
        (400, "prompt too long", Kind.REFUSED),
        (413, "", Kind.REFUSED),
        (422, "", Kind.REFUSED),
        (401, "", Kind.WRONG_KEY),
        (403, "", Kind.FORBIDDEN),
        (404, "", Kind.WRONG_ADDRESS),
        (402, "", Kind.OUT_OF_CREDIT),
        (429, '{"error": {"code": "insufficient_quota"}}', Kind.OUT_OF_CREDIT),
        (429, "Rate limit reached", Kind.BUSY),
        (429, "Request too large for a-model on tokens per min", Kind.REFUSED),
        (502, "<html>Bad Gateway</html>", Kind.BUSY),
        (503, "", Kind.BUSY),
        (529, "", Kind.BUSY),
        (408, "", Kind.FAILED),
        (500, '{"error": {"code": "insufficient_quota"}}', Kind.FAILED),
        (504, "", Kind.FAILED),
        (204, "", Kind.UNREADABLE),
    ],
)
def test_a_status_tells_the_listing_s_fault_from_the_server_s(status, body, kind):
    read = read_reply(status, {}, body.encode(), lambda text: text)
    assert read.kind is kind and (body[:10] in json.loads(read.reason.partition(": ")[2]))


def test_an_error_inside_a_response_of_status_200_counts_as_its_own_status():
    assert reply({"error": {"code": 429, "message": "slow"}}).kind is Kind.BUSY
    choice = {"message": PLAIN, "finish_reason": "stop", "error": {"code": 502}}
    assert reply({"choices": [choice]}).kind is Kind.BUSY
    assert reply({"error": {"code": "x"}}).kind is Kind.UNREADABLE


def test_a_wait_is_read_in_seconds_and_as_a_date_by_the_server_s_clock():
    def after(**headers):
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        return reply({}, 429, headers).after

    assert after(retry_after="7") == 7.0
    assert after(retry_after_ms="250", retry_after="7") == 0.25
    dates = [email.utils.formatdate(seconds, usegmt=True) for seconds in (1e9, 1e9 + 90)]
    assert after(retry_after=dates[1], date=dates[0]) == 90.0
    assert after(retry_after=dates[0]) is None  # long past
    for nonsense in ("", "soon", "-3", "0", "nan", "inf", "1e999"):
        assert after(retry_after=nonsense) is None


def test_a_key_in_a_reply_is_hidden_before_it_is_cut():
    body = json.dumps({"error": "x" * 280 + "a-secret-key"}).encode()
    read = read_reply(400, {}, body, lambda text: text.replace("a-secret-key", "***"))
    assert "a-secret" not in read.reason and "***" in read.reason
