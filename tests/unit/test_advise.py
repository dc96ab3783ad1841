"""`ef-horovod advise`: its table, its verdict, and what it refuses."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

import ef_horovod as ef
from ef_horovod import cost
from ef_horovod.cli import advise
from ef_horovod.cli import main as cli
from ef_horovod.cli.evidence import EVIDENCE, SOURCE
from ef_horovod.cost.model import reference_work
from ef_horovod.cost.probe import measure_work
from ef_horovod.methods.parsing import read_method

ADAM = "FrozenAdam(OneBit())"
MODEL = ["advise", "--parameters", "3.6M", "--reference"]


def run(capsys, *arguments):
    assert cli.main([*MODEL, *arguments]) == 0
    return capsys.readouterr().out


def asked(capsys, *arguments):
    return json.loads(run(capsys, *arguments, "--json"))["answers"]


def test_a_slow_link_is_told_to_compress(capsys):
    text = run(capsys, "--workers", "4", "--bandwidth", "100mbit", "--compute", "60ms")
    head, _, *rows = text.split("\n\n")[0].splitlines()
    assert head.split("  ")[0] == "choice"
    # Three of Horovod; gather, slices and server for each of five methods.
    assert len(rows) == 3 + 5 * 3
    assert "Verdict: take compression=" in text
    assert "100 Mbit/s each way and 50 us from host to host (given)" in text
    assert "forward and backward: 60 ms (given)" in text
    assert "those of the reference machine" in text
    assert "the verdict is by time per step" in text


NODES = ["--workers", "8", "--ranks-per-node", "4", "--bandwidth", "100mbit"]


def test_nodes_with_several_ranks_are_told_to_sum_first(capsys):
    words = [*NODES, "--method", "EF21(TopK(0.01))"]
    text = run(capsys, *words)
    assert "node's bytes out" in text
    assert "nodes: 4 workers on each (given), 32 Gbit/s from one to another" in text
    assert "exchange='hierarchical:gather'" in text
    rows = {row["exchange"]: row for row in asked(capsys, *words)[0]["choices"]}
    flat, two = rows["gather"], rows["hierarchical:gather"]
    assert flat["node_bytes_out"] > 15 * two["node_bytes_out"]
    assert flat["step"] > 5 * two["step"]
    (slow,) = asked(capsys, *words, "--node-bandwidth", "100mbit")
    (after,) = [row for row in slow["choices"] if row["exchange"] == "hierarchical:gather"]
    assert after["step"] > two["step"] + 1


def test_one_node_has_each_row_once(capsys):
    """Two levels are the exchange between nodes there, except that a server hears one worker."""
    words = ["--workers", "4,8", "--ranks-per-node", "4", "--bandwidth", "100mbit"]
    one, two = asked(capsys, *words, "--method", "EF21(TopK(0.01))")
    names = [row["choice"] for row in one["choices"]]
    assert len(names) == len(set(names))
    rows = {row["exchange"]: row for row in one["choices"]}
    assert set(rows) == {"dense", "fp16", "gather", "double_pass", "server", "hierarchical:server"}
    assert rows["server"]["step"] > 3.5 * rows["hierarchical:server"]["step"]
    assert rows["server"]["node_bytes_out"] > 3.5 * rows["hierarchical:server"]["node_bytes_out"]
    assert {row["exchange"] for row in two["choices"]} > set(rows)


def test_exchanges_can_be_picked(capsys):
    words = [*NODES, "--method", "EF21(TopK(0.01))", "--exchange"]
    names = {row["exchange"] for row in asked(capsys, *words, "hierarchical")[0]["choices"]}
    two_levels = {f"hierarchical:{name}" for name in ("gather", "double_pass", "server")}
    assert names == {"dense", "fp16", *two_levels}
    names = {row["exchange"] for row in asked(capsys, *words, "gather")[0]["choices"]}
    assert names == {"dense", "fp16", "gather"}


def test_local_steps_divide_what_an_exchange_costs(capsys):
    words = ["--workers", "4", "--bandwidth", "50mbit", "--method", "ErrorFeedback(TopK(0.01))"]
    words += ["--exchange", "gather"]
    (each,), (local,) = (asked(capsys, *words, "--local-steps", h) for h in ("1", "30"))
    one, thirtieth = (
        next(c for c in answer["choices"] if c["exchange"] == "gather") for answer in (each, local)
    )
    for name in ("bytes_out", "compress", "network", "decode", "step"):
        assert thirtieth[name] == pytest.approx(one[name] / 30), name
    assert "in ef.CompressedUpdates(local_steps=30)" in local["verdict"]
    text = run(capsys, *words, "--local-steps", "30")
    assert "one exchange in 30 local steps (given); Horovod's rows exchange in each" in text
    assert "each makes less progress with local steps" in text


def test_what_was_measured_of_steps_is_shown(capsys):
    words = ["--workers", "4", "--bandwidth", "100mbit", "--compute", "60ms"]
    text = run(capsys, *words, "--method", "ErrorFeedback(OneBit())", "--method", "EF21(Natural())")
    assert "in ef.CompressedUpdates: a step of" in text
    assert "loss 46 % higher" in text
    assert "Steps, not measured: EF21(Natural())" in text
    (one,) = json.loads(run(capsys, *words, "--json", "--method", "ErrorFeedback(OneBit())"))[
        "learning"
    ].values()
    assert {row["compressed"] for row in one} >= {"updates", "gradients"}


def test_evidence_is_that_of_the_page():
    page = (Path(__file__).parents[2] / SOURCE).read_text()
    for row in EVIDENCE:
        assert read_method(row.method)
        name, *facts = row
        assert f"| {' | '.join([f'`{name}`', *facts])} |" in page


def test_rows_are_sorted_and_add_up(capsys):
    (answer,) = asked(capsys, "--workers", "4", "--bandwidth", "1gbit", "--compute", "60ms")
    steps = [choice["step"] for choice in answer["choices"]]
    assert steps == sorted(steps)
    dense = min(c["step"] for c in answer["choices"] if "dense" in c["choice"])
    for choice in answer["choices"]:
        parts = sum(choice[part] for part in ("compress", "network", "decode"))
        assert choice["step"] == pytest.approx(0.06 + parts)
        assert choice["times_dense"] == pytest.approx(dense / choice["step"])


def test_bytes_are_those_of_theory(capsys):
    (answer,) = asked(
        capsys, "--workers", "4", "--bandwidth", "1gbit", "--method", "EF21(TopK(0.01))"
    )
    gather = next(c for c in answer["choices"] if c["choice"].endswith(", gather"))
    moved = cost.method_traffic(ef.EF21(ef.TopK(0.01)), 3_600_000, 4, "gather")
    assert (gather["bytes_out"], gather["bytes_in"]) == (moved.sent, moved.received)
    names = [c["choice"] for c in answer["choices"] if not c["choice"].startswith("Horovod, ")]
    kinds = ("gather", "double_pass", "server")
    assert sorted(names) == sorted(f"EF21(TopK(ratio=0.01)), {kind}" for kind in kinds)


def test_a_fast_link_is_told_to_stay_dense(capsys):
    text = run(capsys, "--workers", "4", "--bandwidth", "400gbit", "--mpi", "ideal")
    assert "Verdict: stay dense: nothing is predicted to take less than 90% of the" in text


def test_what_horovod_does_better_by_itself_is_said(capsys):
    slow = ["--method", "EF21(TopK(0.5))", "--compute", "1ms"]
    text = run(capsys, "--workers", "4", "--bandwidth", "1gbit", *slow)
    assert "Verdict: take Horovod's own hvd.Compression.fp16, without this library" in text


def test_many_workers_get_a_row_each(capsys):
    text = run(capsys, "--workers", "16,64,1024", "--bandwidth", "1gbit")
    for workers in (16, 64, 1024):
        assert f"{workers:5} workers: take compression=" in text
    answers = asked(capsys, "--workers", "16,1024", "--bandwidth", "1gbit")
    assert [answer["workers"] for answer in answers] == [16, 1024]

    def network(answer, kind):
        name = f"ErrorFeedback(OneBit()), {kind}"
        return next(c["network"] for c in answer["choices"] if c["choice"] == name)

    assert network(answers[1], "gather") > 50 * network(answers[0], "gather")
    assert network(answers[1], "double_pass") < 3 * network(answers[0], "double_pass")


OURS = """
from dataclasses import dataclass
import ef_horovod as ef
from ef_horovod.compressors.registry import register_compressor
from ef_horovod.exchange.gather import Gather
from ef_horovod.exchange.registry import register_exchange
from ef_horovod.methods.registry import register_method

@register_compressor(wire_id=200)
class OurTopK(ef.TopK): pass

@register_method
@dataclass(frozen=True)
class OurFeedback(ef.ErrorFeedback): pass

@register_exchange
class Twice(Gather):
    name = "twice"
    def traffic(self, method, d, n):
        once = super().traffic(method, d, n)
        return type(once)(*(2 * nbytes for nbytes in once))
"""


def test_a_module_of_the_user_is_imported(capsys, tmp_path, monkeypatch, own_classes):
    (tmp_path / "our_advise.py").write_text(OURS)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    ours = ["--method", "OurFeedback", "--compressor", "ourtopk:0.01", "--import", "our_advise"]
    (answer,) = asked(capsys, "--workers", "4", "--bandwidth", "1gbit", *ours)
    name = "OurFeedback(OurTopK(ratio=0.01)), "
    sent = {c["choice"].removeprefix(name): c["bytes_out"] for c in answer["choices"]}
    assert sent["twice"] == 2 * sent["gather"]
    assert cli.main([*MODEL, "--workers=4", "--bandwidth=1gbit", "--import=not_there"]) == 1
    assert "got no module 'not_there'" in capsys.readouterr().err


def test_methods_and_compressors_are_combined():
    compressors = [ef.TopK(0.1), ef.OneBit()]
    assert advise.read_methods(["ef21"], compressors) == [ef.EF21(c) for c in compressors]
    assert advise.read_methods([], compressors) == [ef.ErrorFeedback(c) for c in compressors]
    assert len(advise.read_methods([], [])) == len(advise.USUAL_METHODS)


def test_buckets_are_as_long_as_a_model():
    assert advise.bucket_counts(26_214_400 // 4, 25 * 2**20) == {26_214_400 // 4: 1}
    counts = advise.bucket_counts(25_000_000, 25 * 2**20)
    assert sum(length * count for length, count in counts.items()) == 25_000_000
    assert sum(counts.values()) == 4
    assert max(4 * length for length in counts) <= 25 * 2**20
    assert advise.bucket_counts(3, 1) == {1: 3}


def test_the_largest_question_is_answered_at_once(capsys):
    begin = time.process_time()
    assert cli.main([
        "advise", "--reference", "--parameters", "1000T", "--workers", "1000000",
        "--bandwidth", "1gbit",
    ]) == 0  # fmt: skip
    assert time.process_time() - begin < 5
    assert "1,000,000,000,000,000 parameters in 152587891 bucket(s)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--parameters", ["100000T", "1e5", "-1", "inf", "nan", "0", "9" * 500, "9" * 5000]),
        ("--workers", ["1000001", "-4", "inf", "4.5", "9" * 500, "9" * 5000]),
        ("--bandwidth", ["-1gbit", "infbit", "nan", "0gbit", "9" * 500 + "gbit"]),
        ("--latency", ["-1ms", "infs", "nans", "9" * 500 + "s"]),
        ("--compute", ["-1ms", "inf", "9" * 500 + "s"]),
        ("--workers-per-core", ["nan", "inf", "0", "-1", "x", "9" * 500]),
        ("--bucket-bytes", ["0", "-1", "inf", "2147483648", "9" * 5000]),
    ],
)
def test_absurd_numbers_are_refused(option, values, capsys):
    given = {"--parameters": "1M", "--workers": "4", "--bandwidth": "1gbit"}
    for value in values:
        words = [f"{name}={text}" for name, text in {**given, option: value}.items()]
        with pytest.raises(SystemExit) as end:
            cli.main(["advise", "--reference", *words])
        assert end.value.code == 2
        assert "expected" in capsys.readouterr().err


def test_speeds_are_measured_unless_told_otherwise():
    seen = []

    def probe(method, d):
        seen.append((method, d))
        return reference_work(method, d)

    methods = [ef.EF21(ef.TopK(0.01)), ef.ErrorFeedback(ef.OneBit())]
    question = advise.Question(8_000_000, [4], cost.Network(1e9), methods)
    measured = advise.advise(question, probe)
    assert seen == [(method, 4_000_000) for method in methods], "of the length of a bucket"
    assert "measured on this machine now" in advise.page(question, measured)


@pytest.mark.parametrize(
    "method",
    [
        ef.EF21(ef.TopK(0.01)),
        ef.EF21(ef.RandomK(0.01)),
        ef.DoubleSqueeze(ef.OneBit(), server_compressor=ef.OneBit()),
        ef.PowerSGD(rank=2),
    ],
    ids=repr,
)
def test_a_probe_finds_speeds(method):
    work = measure_work(method, 20_000)
    assert work.push > 0
    assert work.copy > 0
    assert all(0 <= seconds < 1e-5 for seconds in work)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "4", "--bandwidth", "fast"], "got the rate 'fast', expected 64kbit or more"),
        (["--workers", "0", "--bandwidth", "1gbit"], "expected an integer of 1 or more"),
        (["--workers", "4,", "--bandwidth", "1gbit"], "expected an integer of 1 or more"),
        (
            [*NODES, "--workers", "2"],
            "got --workers 2 with --ranks-per-node 4, expected equally many workers on each node",
        ),
        ([*NODES, "--workers", "8,6"], "take a multiple of 4 workers, or another --ranks-per-node"),
        ([*NODES, "--exchange", "auto"], "got --exchange auto, expected one that a method here"),
        (
            ["--workers", "4", "--bandwidth", "1gbit", "--exchange", "hierarchical"],
            "take one of these, or give --ranks-per-node, or leave --exchange out",
        ),
        (
            ["--workers", "4", "--bandwidth", "1gbit", "--local-steps", "9", "--method", ADAM],
            "got FrozenAdam(OneBit()) for updates, expected a method without momentum",
        ),
        (["--workers", "4", "--bandwidth", "1gbit", "--compute", "60"], "got the time '60'"),
        (["--workers", "4", "--bandwidth", "1gbit", "--method", "nosuch"], "nosuch"),
        (
            ["--workers", "4", "--bandwidth", "1gbit", "--compressor", "hardthreshold:0.1"],
            "expected a compressor whose payload size follows from d alone",
        ),
    ],
)
def test_what_cannot_be_answered_is_said_in_a_sentence(arguments, message, capsys):
    try:
        status = cli.main([*MODEL, *arguments])
    except SystemExit as end:
        status = end.code
    assert status in (1, 2)
    assert message in capsys.readouterr().err
