"""The mpirun line that `launch/server` writes, without running it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import machinery, util
from pathlib import Path

import pytest

from ef_horovod.server import launch
from ef_horovod.server.__main__ import ended_after, main, make_parser, method_of

ROOT = Path(__file__).parents[2]


def line(capsys, *words, cores=2, root=False, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(os, "geteuid", lambda: 0 if root else 1000)
    assert launch.main(["--dry-run", *words]) == 0
    return capsys.readouterr().out.strip()


def test_two_programs(capsys, monkeypatch):
    words = (
        "-s",
        "2",
        "-w",
        "3",
        "--method",
        "EF21(OneBit())",
        "--",
        "python",
        "my train.py",
        "-x",
    )
    text = line(capsys, *words, monkeypatch=monkeypatch)
    servers, workers = text.split(" : ")
    assert " -np 2 " in servers
    assert servers.endswith(f"{sys.executable} -m ef_horovod.server --method 'EF21(OneBit())'")
    assert workers.startswith("-np 3 ")
    assert workers.endswith(" python 'my train.py' -x")
    for half in (servers, workers):
        assert "-x OMP_NUM_THREADS=1 " in half


@pytest.mark.parametrize(
    ("words", "cores", "root", "there", "not_there"),
    [
        (["-w", "1"], 2, False, [], ["--oversubscribe", "--allow-run-as-root"]),
        (["-w", "2"], 2, False, ["--oversubscribe"], ["--allow-run-as-root"]),
        (["-w", "1"], 2, True, ["--allow-run-as-root"], ["--oversubscribe"]),
        (["-w", "1"], 8, False, ["-x OMP_NUM_THREADS=4"], ["--oversubscribe"]),
        (["-w", "1", "--threads", "3"], 2, False, ["-x OMP_NUM_THREADS=3"], []),
        (["-w", "9", "-H", "a:2,b:9"], 2, False, ["--host a:2,b:9"], ["--oversubscribe"]),
        (["-w", "9", "--hostfile", "h"], 64, False, ["--hostfile h", "THREADS=1"], []),
        (["-w", "1"], 2, False, ["odls_base_sigkill_timeout 3 "], []),
        (["-w", "1", "--checkpoint", "d"], 2, False, ["odls_base_sigkill_timeout 10 "], []),
        (["-w", "2", "--quorum", "1"], 2, False, ["ef_horovod.server --quorum 1 :"], []),
    ],
)
def test_options(words, cores, root, there, not_there, capsys, monkeypatch):
    text = line(capsys, *words, "--", "x", cores=cores, root=root, monkeypatch=monkeypatch)
    assert [word in text for word in there] == [True] * len(there)
    assert not [word for word in not_there if word in text]


def test_the_limit_of_waits_reaches_ranks_on_other_hosts(capsys, monkeypatch):
    words = ("-w", "2", "-H", "a:1,b:2", "--", "x")
    monkeypatch.delenv("EF_HOROVOD_TIMEOUT", raising=False)
    assert "EF_HOROVOD_TIMEOUT" not in line(capsys, *words, monkeypatch=monkeypatch)
    monkeypatch.setenv("EF_HOROVOD_TIMEOUT", "60")
    text = line(capsys, *words, monkeypatch=monkeypatch)
    assert ["-x EF_HOROVOD_TIMEOUT" in half for half in text.split(" : ")] == [True, True]
    text = line(capsys, "--timeout", "1000", *words, monkeypatch=monkeypatch)
    for half in text.split(" : "):  # workers with a shorter one would blame the servers
        assert half.count("EF_HOROVOD_TIMEOUT") == half.count("-x EF_HOROVOD_TIMEOUT=1000") == 1


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["-w", "2"], "got no program for the workers"),
        (["-w", "0", "--", "x"], "got '0', expected an integer of 1 or more"),
        (["-w", str(2**31), "--", "x"], f"got '{2**31}', expected an integer of 1 or more"),
        (["-w", "2", "-s", "-1", "--", "x"], "got '-1', expected an integer of 1 or more"),
        (["-w", "2", "--threads", "1.5", "--", "x"], "got '1.5', expected an integer of 1 or"),
        (["-w", "2", "--quorum", "0", "--", "x"], "got '0', expected an integer of 1 or more"),
        (["-w", "2", "--quorum", "3", "--", "x"], "got a quorum of 3 with 2 workers and 1 servers"),
        (
            ["-w", "3", "-s", "2", "--quorum", "2", "--", "x"],
            "got a quorum of 2 with 3 workers and",
        ),
        *(
            (["-w", "2", "--timeout", text, "--", "x"], "expected a positive number of seconds; le")
            for text in ("-3", "0", "nan", "soon", "-0.5")
        ),
        (["--", "x"], "-w/--workers"),
        (["-w", "2", "--methods", "x", "--", "x"], "unrecognized arguments: --methods"),
        (["-w", "2", "--method", "sgd", "--", "x"], "got the name 'sgd', expected one of"),
        (["-w", "2", "--compressor", "onebit", "--", "x"], "--compressor without --method"),
        (["-w", "2", "--method", "EF21(QSGD(4))", "--", "x"], "expected a contraction"),
    ],
)
def test_mistakes_are_named_before_anything_starts(words, problem, capsys):
    with pytest.raises(SystemExit) as left:
        launch.main(words)
    assert left.value.code == 2
    assert problem in capsys.readouterr().err


def test_servers_know_the_methods_of_others(tmp_path, monkeypatch, own_classes, capsys):
    module = tmp_path / "ours.py"
    module.write_text(
        "import ef_horovod as ef\nfrom ef_horovod.compressors.registry import register_compressor\n"
        "@register_compressor(wire_id=200)\nclass Ours(ef.TopK): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["--import", "ours", "--method", "ErrorFeedback(Ours(0.1))"]
    method = method_of(make_parser().parse_args(words))
    assert repr(method) == "ErrorFeedback(Ours(ratio=0.1))"
    assert main(["--import", "not_there"]) == 2
    assert "got no module 'not_there' when importing" in capsys.readouterr().err


def test_a_wrong_limit_in_the_environment_is_named_too(capsys, monkeypatch):
    monkeypatch.setenv("EF_HOROVOD_TIMEOUT", "-1")
    with pytest.raises(SystemExit):
        launch.main(["-w", "2", "--dry-run", "--", "x"])
    assert "got EF_HOROVOD_TIMEOUT='-1', expected a positive number" in capsys.readouterr().err
    assert main([]) == 2, "nor does a server start"
    assert "got EF_HOROVOD_TIMEOUT='-1', expected a positive number" in capsys.readouterr().err


def test_a_limit_without_end_is_one():
    assert make_parser().parse_args(["--timeout", "inf"]).timeout == float("inf")
    with ended_after(float("inf"), lambda: None):
        pass


@pytest.mark.parametrize("option", ["--checkpoint", "--log"])
def test_a_server_that_cannot_write_says_so_before_it_starts(option, tmp_path, capsys):
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "x"
    assert main([option, str(place)]) == 2
    said = capsys.readouterr().err
    assert f"error: got {option} {place}, which cannot be written" in said
    assert said.count("\n") == 1


def test_methods_of_the_command_line():
    words = [
        "--method",
        "doublesqueeze",
        "--compressor",
        "topk:0.01",
        "--server-compressor",
        "onebit",
    ]
    method = method_of(make_parser().parse_args(words))
    assert repr(method) == "DoubleSqueeze(TopK(ratio=0.01), server_compressor=OneBit())"
    assert method_of(make_parser().parse_args([])) is None


def test_the_script_runs_it_in_the_environment(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    loader = machinery.SourceFileLoader("launch_server", str(ROOT / "launch" / "server"))
    script = util.module_from_spec(util.spec_from_loader("launch_server", loader))
    loader.exec_module(script)
    calls = []
    monkeypatch.setattr(script, "prepare", lambda **_: Path(sys.executable))
    monkeypatch.setattr(script.os, "execve", lambda *call: calls.append(call))
    monkeypatch.setattr(sys, "argv", ["launch/server", *LINE])
    script.main()
    [(program, words, environment)] = calls
    shown = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert program == Path(sys.executable)
    assert "-np 4 " in shown.stdout
    assert os.access(ROOT / "launch" / "server", os.X_OK)


LINE = ["-w", "4", "--dry-run", "--", "python", "train.py"]


def test_as_a_module():
    command = [sys.executable, "-m", "ef_horovod.server.launch", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--dry-run" in shown
