"""`TrainingLog`: what its lines say, how a resumed training goes on, and what it refuses."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import ef_horovod as ef
from ef_horovod.common import extras
from ef_horovod.errors import LogError
from ef_horovod.exchange.channel import conclude, settle
from ef_horovod.training.buckets import plan_buckets
from ef_horovod.training.driver import StepDriver
from ef_horovod.training.log import TrainingLog
from ef_horovod.training.log_file import read_log
from ef_horovod.transports.local import local_group

SHAPES = {"a": (40, 50), "b": (30, 40), "bias": (7,)}
METHOD = ef.ErrorFeedback(ef.TopK(ratio=0.1))


class Rank(StepDriver[Any]):
    """A rank with NumPy gradients, as an adapter has them."""

    def __init__(self, transport, method=METHOD, exchange="auto"):
        named = [(name, np.empty(shape, np.float32)) for name, shape in SHAPES.items()]
        plans = plan_buckets(
            named, method, dense=lambda name, _: name == "bias", bucket_bytes=10**6,
            device_of=lambda _: None,
        )  # fmt: skip
        buckets = []
        for plan in plans:
            channel = plan.open(np.empty(plan.length, np.float32), transport, exchange=exchange)
            buckets.append(SimpleNamespace(channel=channel, slots=plan.slots))
        super().__init__(method, transport, buckets)

    def start(self, gradient):
        for bucket in self.buckets:
            for slot in bucket.slots:
                bucket.channel.gradient[slot.start : slot.stop] = gradient[slot.name]
            bucket.channel.start(self.step)


def finish(ranks):
    """The other half of `StepDriver._finish`, of several ranks in one thread."""
    goods = [settle(rank._channels()) for rank in ranks]
    for rank, good in zip(ranks, goods, strict=True):
        rank._set_step(rank.step + (conclude(rank._channels(), good=good) is not None))


def gradient(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {
        name: (scale * rng.standard_normal(math.prod(shape))).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def train(ranks, log, steps, *, first=0, every_loss=None):
    """Steps of all ranks in this thread; each step's gradient of rank 0."""
    seen = []
    for step in range(first, first + steps):
        own = [gradient(10 * step + i) for i in range(len(ranks))]
        for rank, one in zip(ranks, own, strict=True):
            rank.start(one)
        finish(ranks)
        log.step(1 / (step + 1) if every_loss is None else every_loss)
        seen.append(own[0])
    return seen


def pair(**options):
    return [Rank(transport, **options) for transport in local_group(2, timeout=10)]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_has_what_stats_say(tmp_path):
    path, ranks = tmp_path / "runs" / "log.jsonl", pair()
    train(ranks, TrainingLog(path, ranks[0], every=2), 6)
    header, *found = lines(path)
    assert [line["step"] for line in found] == [2, 4, 6]
    assert [line["loss"] for line in found] == [1 / 2, 1 / 4, 1 / 6]
    total, last = ranks[0].stats()[-1], found[-1]
    for name in ("bytes_out", "bytes_in", "dense_bytes_out", "skipped", "ratio"):
        assert last[name] == getattr(total, name), name
    for name in ("seconds_compress", "seconds_wait", "seconds_decompress"):
        assert last[name] == pytest.approx(getattr(total, name), abs=1e-6)
    assert last["relative_error"]["total"] == pytest.approx(total.relative_error, rel=1e-3)
    assert (header["method"], header["ranks"], header["rank"]) == (repr(METHOD), 2, 0)
    assert (header["parameters"], header["start"]) == (total.num_elements, 0)
    assert header["exchanges"] == ["dense", "gather"]
    assert {"python", "numpy", "ef_horovod"} <= header["versions"].keys()


@pytest.mark.parametrize("exchange", ["gather", "double_pass"])
def test_norms_are_those_of_each_parameter(tmp_path, exchange):
    path, ranks = tmp_path / "log.jsonl", pair(exchange=exchange)
    seen = train(ranks, TrainingLog(path, ranks[0], every=3), 6)
    state = ranks[0].state_dict()["parameters"]
    last = lines(path)[-1]
    for name in SHAPES:
        error, norm = last["layers"][name]
        assert norm == pytest.approx(np.linalg.norm(seen[-1][name]), rel=1e-3)
        kept = [v for key, v in state.get(name, {}).items() if key.endswith("worker.error")]
        expected = np.linalg.norm(np.concatenate(kept)) if kept else 0.0
        assert error == pytest.approx(expected, rel=1e-3)
    assert 0 == last["layers"]["bias"][0] < last["layers"]["a"][0]
    norms = np.array(list(last["layers"].values()))
    assert [last["error_norm"], last["gradient_norm"]] == pytest.approx(
        np.linalg.norm(norms, axis=0), rel=1e-3
    )


def test_steps_that_are_not_logged_measure_nothing(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(Rank, "measure", lambda self: measured.append(self.step))
    ranks = pair()
    train(ranks, TrainingLog(tmp_path / "log", ranks[0], every=4), 9)
    assert measured == [3, 7]
    assert not (tmp_path / "other").exists()


def test_only_rank_0_writes_unless_the_path_has_the_rank(tmp_path):
    ranks = pair()
    train(ranks, TrainingLog(tmp_path / "log", ranks[1], every=1), 2)
    assert not (tmp_path / "log").exists()
    train(ranks, TrainingLog(tmp_path / "log{rank}", ranks[1], every=1), 2)
    assert lines(tmp_path / "log1")[0]["rank"] == 1


def test_a_dropped_step_is_counted_and_has_no_norms(tmp_path):
    path, ranks = tmp_path / "log", pair()
    log = TrainingLog(path, ranks[0], every=1)
    train(ranks, log, 1)
    for rank, bad in zip(ranks, (False, True), strict=True):
        rank.start({n: v * (np.nan if bad else 1) for n, v in gradient(1).items()})
    finish(ranks)
    log.step(float("nan"))
    last = lines(path)[-1]
    assert (last["step"], last["skipped"], last["loss"]) == (1, 1, None)
    run = read_log(path)
    assert [line["step"] for line in run.lines] == [1, 1], "the dropped step has a line"
    assert math.isnan(run.lines[-1]["loss"])
    assert (last["error_norm"], last["gradient_norm"], last["layers"]) == (None, None, {})


def test_close_writes_the_last_step_once(tmp_path):
    path, ranks = tmp_path / "log", pair()
    with TrainingLog(path, ranks[0], every=4) as log:
        train(ranks, log, 6)
    log.close()
    assert [line["step"] for line in lines(path)[1:]] == [4, 6]
    assert lines(path)[-1]["bytes_out"] == ranks[0].stats()[-1].bytes_out


def test_a_resumed_training_goes_on_in_the_file(tmp_path):
    """The second process starts at step 5; the first one was killed after 7, within a line."""
    path, ranks = tmp_path / "log", pair()
    train(ranks, TrainingLog(path, ranks[0], every=1), 5)
    states, sent = [rank.state_dict() for rank in ranks], ranks[0].stats()[-1].bytes_out
    train(ranks, TrainingLog(path, ranks[0], every=1), 2, first=5)
    path.write_text(path.read_text()[:-20])
    again = pair()
    for rank, state in zip(again, states, strict=True):
        rank.load_state_dict(state)
    train(again, TrainingLog(path, again[0], every=1), 3, first=5)
    run = read_log(path)
    assert [line["step"] for line in run.lines] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert (run.header["start"], run.notes) == (5, [])
    assert run.lines[-1]["bytes_out"] == sent + again[0].stats()[-1].bytes_out
    seconds = [line["seconds"] for line in run.lines]
    assert seconds == sorted(seconds)


def test_another_training_in_the_file_is_the_one_that_is_read(tmp_path):
    path = tmp_path / "log"
    for steps in (5, 3):
        ranks = pair()
        train(ranks, TrainingLog(path, ranks[0], every=1), steps)
    run = read_log(path)
    assert [line["step"] for line in run.lines] == [1, 2, 3]
    assert "several trainings" in run.notes[0]
    assert run.lines[-1]["bytes_out"] == ranks[0].stats()[-1].bytes_out


def test_a_torn_last_line_is_left_out(tmp_path):
    path, ranks = tmp_path / "log", pair()
    train(ranks, TrainingLog(path, ranks[0], every=1), 3)
    path.write_text(path.read_text()[:-20])
    run = read_log(path)
    assert [line["step"] for line in run.lines] == [1, 2]
    assert str(path) in run.notes[0]
    assert "cut off" in run.notes[0]


HEADER = '{"format": "ef_horovod training log", "version": 1, "start": 0, "ranks": 2'


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "could not read .*, expected a training log; name"),
        ("", "has no steps, expected some; see"),
        ("round 1\n", "line 1 is no JSON"),
        ("[1]\n", "line 1 has '\\[1\\]', expected a line of a training log"),
        ('{"server": 0}\n', "line 1 has no header, expected that of a training log"),
        (HEADER.replace("1", "2", 1) + "}\n", "version 2 of a training log, expected 1; read it"),
        (HEADER + "}\n", "line 1 has None as 'parameters', expected a number"),
        (HEADER + ', "parameters": 3}\n{"step": "a"}\n', "line 2 has 'a' as 'step', expected"),
        (HEADER + ', "parameters": 3}\n{"ste\n{}\n', "line 2 is no JSON"),
    ],
)
def test_files_that_are_no_logs_are_refused_by_name(tmp_path, text, problem):
    path = tmp_path / "log"
    if text is not None:
        path.write_text(text)
    with pytest.raises(LogError, match=problem) as caught:
        read_log(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", ["my thesis", '{"server": 0}\n', "\x00\x01"])
def test_another_file_is_not_written_to(tmp_path, content):
    path = tmp_path / "thesis"
    path.write_text(content)
    with pytest.raises(LogError, match="thesis is another file, expected a training log"):
        TrainingLog(path, pair()[0])
    assert path.read_text() == content


def test_a_place_that_cannot_be_written_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("")
    ranks = pair()
    with pytest.raises(LogError, match="could not write .*file/log .*; name another path"):
        train(ranks, TrainingLog(tmp_path / "file" / "log", ranks[0], every=1), 1)


def test_a_full_disk_does_not_end_the_training(tmp_path, monkeypatch):
    path, ranks = tmp_path / "log", pair()
    log = TrainingLog(path, ranks[0], every=1)
    train(ranks, log, 1)
    path.unlink()
    path.mkdir()
    with pytest.warns(UserWarning, match="could not write .*log .* goes on without a log"):
        train(ranks, log, 2)


def test_wrong_arguments_are_refused(tmp_path):
    with pytest.raises(ef.UnsupportedError, match="got 3 as path, expected a file name and then"):
        TrainingLog(3, "log")
    with pytest.raises(ef.UnsupportedError, match="got a float as optimizer, expected one that"):
        TrainingLog(tmp_path / "log", 1.0)
    with pytest.raises(ValueError, match="every=0, expected a whole number of at least 1"):
        TrainingLog(tmp_path / "log", pair()[0], every=0)


def test_scalars_get_each_line(tmp_path):
    ranks, seen = pair(), []
    log = TrainingLog(
        tmp_path / "log", ranks[0], 2, scalars=lambda values, step: seen.append((step, values))
    )
    train(ranks, log, 4)
    assert [step for step, _ in seen] == [2, 4]
    assert seen[0][1].keys() == {"loss", "ratio", "error_norm", "gradient_norm", "skipped"}
    assert seen[0][1]["loss"] == 0.5


@pytest.mark.parametrize("adapter", ["torch", "tensorflow"])
def test_without_tensorboard_it_says_what_to_install(tmp_path, monkeypatch, adapter):
    log = pytest.importorskip(f"ef_horovod.{adapter}.log")
    monkeypatch.setattr(extras.util, "find_spec", lambda name: None)
    expected = r"no module 'tensorboard', which ef.TrainingLog\(tensorboard=\) needs: install it by"
    with pytest.raises(ModuleNotFoundError, match=expected):
        log.TrainingLog(tmp_path / "log", pair()[0], tensorboard=tmp_path)


@pytest.mark.parametrize("loss", ["0.5", np.ones(3), np.ones(0)])
def test_a_loss_that_is_no_number_is_refused_on_all_ranks(tmp_path, loss):
    for rank in pair():
        log = TrainingLog(tmp_path / "log", rank, every=10)
        with pytest.raises(ValueError, match="as loss, expected a number or a tensor of one"):
            log.step(loss)
        log.step(np.ones((1, 1)))
