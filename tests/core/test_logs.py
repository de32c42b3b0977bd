import json

from afmrl_jax.core.logs import RunWriter, cut_back, duration


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_logs_after_the_restored_step_and_a_torn_line_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    cut_back(path, 2)
    assert steps(path) == [1, 2]


def test_a_resumed_run_logs_each_step_once_and_never_writes_nan(tmp_path, capsys):
    for first, last in [(0, 4), (2, 5)]:
        writer = RunWriter(tmp_path, first_step=first, steps=5, active=True)
        for step in range(first + 1, last + 1):
            writer.log(step, {"loss": float("nan") if step == 3 else 1.0}, "loss 1")
        writer.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[2]["loss"] is None
    assert "step 5/5  loss 1  ETA 0:00" in capsys.readouterr().out


def test_an_inactive_writer_leaves_nothing(tmp_path):
    writer = RunWriter(tmp_path / "w", first_step=0, steps=1, active=False)
    writer.log(1, {"loss": 1.0}, "loss")
    writer.close()
    assert not (tmp_path / "w").exists()


def test_durations_read_as_a_clock():
    assert [duration(s) for s in (5, 65, 3600 + 125)] == ["0:05", "1:05", "1:02:05"]
