"""Against a real HTTP server, as any OpenAI-compatible one answers, and as a broken one does."""

import base64
import io
import json
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from openai_server import Server, said
from PIL import Image
from workdirs import lines

from afmrl_jax import runner
from afmrl_jax.annotation.answer_files import AnswerFile
from afmrl_jax.annotation.endpoint import GIVE_UP
from afmrl_jax.catalog.opening import CatalogOptions, open_catalogue
from afmrl_jax.core.errors import TryAgain, UserError
from afmrl_jax.programs import annotate

KEY = "sk-secret-1234"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def server():
    with Server() as server:
        yield server


@pytest.fixture
def config(agcl_config, server, monkeypatch):
    from afmrl_jax.configs.annotate import get_config

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    config = get_config()
    config.data.update(path=agcl_config.data.path, cache_dir=agcl_config.data.cache_dir)
    config.api.base_url = server.address
    config.api.update(model="a-model", concurrency=4, retries=2, timeout=10.0)
    return config


def annotated(config, workdir):
    runner.run(config, workdir)
    return lines(workdir / "attributes.jsonl"), lines(workdir / "invalid.jsonl")


def test_every_listing_gets_the_model_s_attributes(config, server, tmp_path, capsys):
    valid, invalid = annotated(config, tmp_path)
    assert not invalid and len({line["listing_id"] for line in valid}) == len(valid) == 40
    assert all(line["attributes"] == {"color": "red", "type": "mug"} for line in valid)
    told = capsys.readouterr().out
    assert "40 of 40 listings are answered; this start: 40 valid; 40 requests, 400 tokens" in told
    assert "40 valid, 2.0 attributes each; read as plain 40\nnames: color 40, type 40\n" in told
    config.data.unlock().attributes = str(tmp_path / "attributes.jsonl")
    catalog = open_catalogue(CatalogOptions.of(config), tmp_path)
    assert catalog.listing(7).attributes == {"color": "red", "type": "mug"}


def test_the_model_is_shown_prompt_photo_and_text(config, server, tmp_path):
    config.update(prompt="Name them.", image_side=20, text_characters=12, split="test")
    config.api.options = '{"max_tokens": 9, "seed": 3}'
    annotated(config, tmp_path)
    payload = next(p for p in server.payloads if "blue" not in json.dumps(p))
    image, text = payload.pop("messages")[0]["content"]
    assert payload == {"model": "a-model", "max_tokens": 9, "seed": 3}
    head, _, data = image["image_url"]["url"].partition(",")
    assert head == "data:image/jpeg;base64"
    assert max(Image.open(io.BytesIO(base64.b64decode(data))).size) == 20
    assert text["text"].startswith("Name them.\n\n")
    assert len(text["text"]) == len("Name them.\n\n") + 12
    assert set(server.headers) == {("/v1/chat/completions", f"Bearer {KEY}")}


def test_a_busy_server_is_asked_again(config, server, tmp_path, capsys):
    busy = (429, b"{}"), (503, b"<html>")
    server.reply = lambda n: busy[n % 2] if n % 4 < 2 else said("a: b")
    config.api.concurrency = 1
    valid, _ = annotated(config, tmp_path)
    assert len(valid) == 40 and len(server.payloads) >= 80
    assert f"{len(server.payloads)} requests" in capsys.readouterr().out


def test_a_server_that_only_fails_ends_the_run_and_the_same_command_goes_on(
    config, server, tmp_path
):
    server.reply = lambda n: said("a: b") if n < 5 else (500, f"broken {KEY}".encode())
    config.api.update(concurrency=1, retries=1)
    with pytest.raises(TryAgain, match="broken") as error:
        runner.run(config, tmp_path)
    assert f"to {GIVE_UP} listings in a row" in str(error.value) and KEY not in str(error.value)
    assert len(lines(tmp_path / "attributes.jsonl")) == 5
    # Then a request without a listing; one more may be under way when the last is counted.
    assert 5 + 2 * (GIVE_UP + 1) <= len(server.payloads) <= 5 + 2 * (GIVE_UP + 2)
    server.reply = lambda n: said("a: b")
    config.api.concurrency = 3  # may change
    valid, _ = annotated(config, tmp_path)
    assert Counter(line["listing_id"] for line in valid).most_common(1)[0][1] == 1
    assert len(valid) == 40


def test_an_answer_that_is_none_is_counted_and_asked_again_another_time(
    config, server, tmp_path, capsys
):
    garbage = [
        b"",
        b"<html>",
        b"\xff\xfe",
        b"[" * 100_000,
        b"[]",
        b"{}",
        b'{"choices": []}',
        b'{"choices": [{"message": null}]}',
        said([{"type": "text"}]),
        b'{"choices": [{"message": {"content": "' + b"x" * (2 << 20) + b'"}}]}',
        (504, b'{"error": {"message": "bad image"}}'),
        (200, [said("a: b")], 1000),
    ]
    config.api.update(concurrency=1, retries=0)
    server.reply = lambda n: garbage[n // 2] if n % 2 and n // 2 < len(garbage) else said("a: b")
    valid, invalid = annotated(config, tmp_path)
    assert len(valid) == 40 - len(garbage) and not invalid
    told = capsys.readouterr().out
    assert f"{len(garbage)} unanswered" in told and "Some got no answer: the same command" in told
    assert "bad image" in told and "no answer of a chat model" in told
    assert len(annotated(config, tmp_path)[0]) == 40
    assert len(server.payloads) == 40 + len(garbage)


def test_a_silent_or_dripping_server_is_given_up_in_time(config, server, tmp_path):
    def drip():
        for _ in range(100):
            time.sleep(0.05)
            yield b" "

    def reply(n):
        time.sleep(2 if n == 0 else 0)
        return (200, drip(), 100) if n == 1 else said("a: b")

    server.reply = reply
    config.api.update(concurrency=2, timeout=0.5, retries=4)
    valid, _ = annotated(config, tmp_path)
    assert len(valid) == 40


def test_answers_of_no_format_are_kept_apart_and_not_asked_again(config, server, tmp_path):
    answers = {
        "malformed": said("A fine mug."),
        "duplicate": said("a: b; a: c"),
        "empty": said(None),
        "too_long": said("a: " + "b" * 5000),
        "unclosed": said("a: b; c: d", finish="length"),
    }
    config.split = "test"  # 4 listings
    config.api.concurrency = 1
    for verdict, body in answers.items():
        server.reply = lambda n, body=body: body
        config.prompt = verdict
        valid, invalid = annotated(config, tmp_path / verdict)
        assert not valid and {line["verdict"] for line in invalid} == {verdict}
        assert len(invalid) == 4
    asked = len(server.payloads)
    annotated(config, tmp_path / verdict)
    assert len(server.payloads) == asked


def test_refused_listings_are_kept_with_the_reason_and_not_asked_again(
    config, server, tmp_path, capsys
):
    """The first twelve, more than may be unanswered in a row."""
    plain = f"{config.prompt}\n\nred mug"

    def reply(n):
        if n <= 12 and server.texts()[n] != plain:
            return 400, b'{"error": {"message": "content policy"}}'
        return said("a: b")

    server.reply = reply
    config.api.concurrency = 1
    valid, invalid = annotated(config, tmp_path)
    assert len(valid) == 28 and len(server.payloads) == 41
    assert {(line["verdict"], line["answer"]) for line in invalid} == {("refused", "")}
    assert len(invalid) == 12 and all("content policy" in line["reason"] for line in invalid)
    told = capsys.readouterr().out
    assert "this start: 28 valid, 12 refused; 41 requests" in told and "refused 12" in told
    annotated(config, tmp_path)
    assert len(server.payloads) == 41
    kept = (tmp_path / "invalid.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "invalid.jsonl").write_text("".join(kept[1:]))
    valid, invalid = annotated(config, tmp_path)
    assert len(valid) == 29 and len(invalid) == 11 and len(server.payloads) == 42


def test_an_answer_that_something_else_stopped_is_kept_apart_with_its_part(
    config, server, tmp_path, capsys
):
    server.reply = lambda n: said("color: red; material: co", finish="content_filter")
    valid, invalid = annotated(config, tmp_path)
    assert not valid and len(invalid) == len(server.payloads) == 40
    assert invalid[0] | {"listing_id": "", "content": ""} == {
        "listing_id": "",
        "content": "",
        "verdict": "stopped",
        "reason": 'finish_reason "content_filter"',
        "answer": "color: red; material: co",
    }


@pytest.mark.parametrize("budget, asked", [({"requests": 7}, 7), ({"tokens": 95}, 10)])
def test_the_budget_stops_a_run_that_the_same_command_continues(
    budget, asked, config, server, tmp_path, capsys
):
    config.budget.update(budget)
    config.api.concurrency = 1
    valid, _ = annotated(config, tmp_path)
    assert len(valid) == len(server.payloads) == asked
    assert "is spent: the same command goes on" in capsys.readouterr().out
    assert len(annotated(config, tmp_path)[0]) == len(server.payloads) == 2 * asked


def test_retries_and_concurrent_requests_stay_within_the_budget(config, server, tmp_path):
    server.reply = lambda n: (500, b"") if n % 3 else said("a: b")
    config.budget.requests = 20
    config.api.concurrency = 8
    annotated(config, tmp_path)
    assert len(server.payloads) == 20


@pytest.mark.parametrize("usage", ["x", {}, {"total_tokens": -5}, {"total_tokens": "x"}])
def test_where_a_server_tells_no_tokens_characters_count(usage, config, server, tmp_path):
    body = json.loads(said("a: b")) | {"usage": usage}
    server.reply = lambda n: json.dumps(body).encode()
    config.api.concurrency = 1
    config.budget.tokens = 3 * len(config.prompt)
    assert 1 <= len(annotated(config, tmp_path)[0]) <= 3


def test_a_killed_run_goes_on_and_asks_nothing_twice(config, server, tmp_path):
    killed = threading.Event()
    config.api.timeout = 200.0  # nothing is given up, however busy the machine is

    def reply(n):
        if n >= 8:
            killed.wait(200)
        return said("a: b")

    server.reply = reply
    command = [sys.executable, "-m", "afmrl_jax.main", "--config=configs/annotate.py"]
    fields = {"data.path": config.data.path, "data.cache_dir": config.data.cache_dir}
    fields |= {f"api.{k}": config.api[k] for k in ("base_url", "model", "concurrency", "timeout")}
    fields |= {"api.retries": config.api.retries}
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    path = tmp_path / "attributes.jsonl"
    with subprocess.Popen(
        [*command, f"--workdir={tmp_path}", *flags], cwd=ROOT, stderr=subprocess.PIPE
    ) as process:
        end = time.monotonic() + 200
        while not path.exists() or path.read_bytes().count(b"\n") < 6:
            assert process.poll() is None and time.monotonic() < end, process.stderr.read()
            time.sleep(0.01)
        with pytest.raises(UserError, match="is being written by another run"):
            runner.run(config, tmp_path)
        process.kill()
    killed.set()
    before = lines(path)
    path.write_bytes(path.read_bytes() + b'{"listing_id": "mug-re')
    server.payloads.clear()
    valid, _ = annotated(config, tmp_path)
    assert valid[: len(before)] == before
    assert len({line["listing_id"] for line in valid}) == len(valid) == 40
    assert len(server.payloads) == 40 - len(before)


def test_the_key_is_written_nowhere_even_if_the_server_repeats_it(
    config, server, tmp_path, capfd, caplog
):
    caplog.set_level("DEBUG")
    bodies = [said(f"color: {KEY}"), said(f"{KEY} what"), (400, KEY.encode()), KEY.encode()]
    server.reply = lambda n: bodies[n % 4]
    annotated(config, tmp_path)
    kept = "".join(p.read_text(errors="replace") for p in tmp_path.rglob("*") if p.is_file())
    out, err = capfd.readouterr()
    assert "color" in kept and "***" in kept and "***" in out
    assert KEY not in kept + out + err + caplog.text


@pytest.mark.parametrize("key", [f"{KEY}\nx", "sk-sécret"])
def test_a_key_that_no_header_can_hold_is_told_without_showing_it(
    key, config, tmp_path, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="the key in OPENAI_API_KEY") as error:
        runner.run(config, tmp_path)
    assert "sk" not in str(error.value)


@pytest.mark.parametrize(
    "status, told", [(401, "refuses the key"), (403, "refuses the key"), (404, "no model 'a-mod")]
)
def test_what_no_retry_can_mend_ends_the_run_at_once(status, told, config, server, tmp_path):
    server.reply = lambda n: (status, f'{{"error": "{KEY}"}}'.encode())
    config.api.concurrency = 1
    with pytest.raises(UserError, match=told) as error:
        runner.run(config, tmp_path)
    assert KEY not in str(error.value)
    assert len(server.payloads) <= 2


@pytest.mark.parametrize(
    "field, value, told",
    [
        ("model", "", "say which model answers"),
        ("key_variable", "sk-secret", r"name of an environment variable"),
        ("base_url", "localhost:8000", "must be an address"),
        ("base_url", "http://host:port/v1", "must be an address"),
        ("base_url", "http://me:secret@localhost/v1", "must be an address"),
        ("options", "max_tokens=3", "write a JSON object"),
        ("options", '{"stream": true}', "write a JSON object"),
        ("concurrency", 0, "api.concurrency is 0"),
    ],
)
def test_a_field_that_cannot_be_right_is_told(field, value, told, config, server, tmp_path):
    config.api[field] = value
    with pytest.raises(UserError, match=told) as error:
        runner.run(config, tmp_path)
    assert "secret" not in str(error.value)
    assert not server.payloads


def test_another_model_does_not_go_on_with_the_answers_of_the_first(config, tmp_path):
    config.split = "test"
    annotated(config, tmp_path)
    config.api.model = "another"
    with pytest.raises(UserError, match=r"api\.model was 'a-model' and is now 'another'"):
        runner.run(config, tmp_path)


def rename(folder: Path, listing_id: str, title: str) -> None:
    """Puts another listing, with another photo, under a listing's id."""
    path = folder / "products.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        if row["listing_id"] == listing_id:
            row["title"] = title
            Image.new("RGB", (24, 24), "green").save(folder / row["images"][0])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_a_listing_that_changed_is_asked_again_and_its_old_answer_laid_over_nothing(
    config, server, tmp_path, catalogue_folder, caplog
):
    shop = shutil.copytree(catalogue_folder, tmp_path / "shop")
    config.data.path, config.split = str(shop), "test"
    valid, _ = annotated(config, tmp_path / "run")
    rename(shop, valid[0]["listing_id"], "Green sofa")
    config.data.unlock().attributes = str(tmp_path / "run" / "attributes.jsonl")
    catalog = open_catalogue(CatalogOptions.of(config), tmp_path)
    changed = catalog.listing_ids.index(valid[0]["listing_id"]).as_py()
    assert catalog.listing(changed).attributes == {}
    assert "1 lines were written for other texts and photos" in caplog.text
    del config.data.attributes
    again, _ = annotated(config, tmp_path / "run")
    assert len(server.payloads) == len(valid) + 1
    assert "1 listings have other texts or photos" in caplog.text
    assert again[: len(valid)] == valid  # nothing that was paid is lost


def test_one_file_tells_listings_of_two_catalogues_with_one_id_apart(
    config, server, tmp_path, catalogue_folder
):
    other = shutil.copytree(catalogue_folder, tmp_path / "other")
    rename(other, "mug-red-0", "Green sofa")
    config.data.path = f"{catalogue_folder},{other}"
    server.reply = lambda n: said(f"Color: {n}")
    valid, _ = annotated(config, tmp_path / "run")
    assert len(valid) == len(server.payloads) == 40 + 1  # what is the same is asked once
    config.data.unlock().attributes = str(tmp_path / "run" / "attributes.jsonl")
    catalog = open_catalogue(CatalogOptions.of(config), tmp_path)
    for index in (0, 40):
        listing = catalog.listing(index)
        assert listing.listing_id == "mug-red-0"
        (line,) = [row for row in valid if row["content"] == catalog.content(index).key]
        assert listing.attributes == line["attributes"]


def test_an_endpoint_is_asked_by_one_process(config, tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(UserError, match="one machine alone"):
        annotate.main(config, tmp_path, None)


def test_a_last_line_whose_end_an_editor_left_out_is_kept(tmp_path):
    path = tmp_path / "attributes.jsonl"
    path.write_text('{"listing_id": "a", "content": "1"}\n{"listing_id": "b", "content": "2"}')
    for _ in range(2):
        answers = AnswerFile(path)
        assert answers.keys == {("a", "1"), ("b", "2")}
        answers.close()
    assert path.read_text().endswith('"content": "2"}\n')


def test_a_line_that_is_no_answer_is_told(config, tmp_path):
    (tmp_path / "attributes.jsonl").write_text('{"listing_id": "x", "content": "1"}\n[]\n')
    with pytest.raises(UserError, match=r"attributes\.jsonl line 2 is no answer"):
        runner.run(config, tmp_path)


def test_without_the_client_s_package_the_user_is_told_what_to_install(
    config, tmp_path, monkeypatch
):
    monkeypatch.delitem(sys.modules, "afmrl_jax.annotation.endpoint", raising=False)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match="annotate needs the package openai"):
        runner.run(config, tmp_path)
