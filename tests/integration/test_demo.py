"""The demo, shortened: its table, its files and its numbers hold together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import machinery, util
from pathlib import Path
from typing import Any

import pytest
from jobs import ROOT, run_example

METHODS = ("dense", "fp16", "onebit", "topk")


@pytest.fixture(scope="module", params=["torch", "tensorflow"])
def demo(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """What a quick demo printed, and its folder."""
    out = tmp_path_factory.mktemp("demo")
    script = f"demo_{request.param}.py"
    printed = run_example(script, "--quick", "--out", out, "--methods", *METHODS, ranks=2)
    return printed, out


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


@pytest.mark.parallel
def test_table_is_printed_and_kept(demo: tuple[str, Path]) -> None:
    printed, out = demo
    text = (out / "table.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(METHODS)
    for label in ("Horovod, dense", "Horovod, fp16", "ErrorFeedback(OneBit())", "EF21(TopK(0.01))"):
        assert sum(label in row for row in rows) == 1
    for row in rows:
        assert row in printed


@pytest.mark.parallel
def test_bytes_are_as_few_as_promised(demo: tuple[str, Path]) -> None:
    runs = {run["method"]: run for run in events(demo[1], "run")}
    part = {method: run["bytes_sent_compressed"] for method, run in runs.items()}
    assert part["topk"] <= part["dense"] / 60
    assert part["onebit"] <= part["dense"] / 30
    assert part["fp16"] == part["dense"] / 2
    elements = 32 * 64 * 9 + 1024 * 128 + 128 * 10
    assert part["dense"] == 4 * elements, "two ranks: a ring sends each number once"


@pytest.mark.parallel
def test_kernel_saw_the_bytes(demo: tuple[str, Path]) -> None:
    """A sanity check only, for other processes use the device too; test_wire_truth is strict."""
    for run in events(demo[1], "run"):
        assert run["bytes_kernel"] is not None, "launch/test needs Linux: no loopback counter here"
        assert run["bytes_kernel"] > 0.95 * run["bytes_sent"]
        assert run["bytes_control"] > 0


@pytest.mark.parallel
def test_losses_fall_in_the_log(demo: tuple[str, Path]) -> None:
    for method in METHODS:
        steps = [step for step in events(demo[1], "step") if step["method"] == method]
        assert steps[0]["loss"] > 2.0, "ten classes, none known yet"
        assert steps[-1]["loss"] < 1.5
        sent = [step["bytes_sent"] for step in steps]
        assert sent == sorted(sent)
        assert sent[0] > 0


@pytest.mark.parallel
def test_plot_is_an_image(demo: tuple[str, Path]) -> None:
    assert (demo[1] / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_launch_demo_explains_itself() -> None:
    command = [sys.executable, ROOT / "launch" / "demo", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for word in ("--quick", "--data", "--framework {torch,tensorflow}"):
        assert word in text


@pytest.mark.parametrize(
    ("words", "script"),
    [
        ([], "demo_torch.py"),
        (["--framework", "torch"], "demo_torch.py"),
        (["--framework", "tensorflow", "--lr", "0.01"], "demo_tensorflow.py"),
    ],
)
def test_launch_demo_starts_the_frameworks_script(
    words: list[str], script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch_demo = load_launch_demo()
    commands: list[list[str]] = []
    monkeypatch.setattr(launch_demo, "prepare", lambda *_, **__: Path(sys.executable))
    monkeypatch.setattr(
        launch_demo, "run", lambda command, env: commands.append([*map(str, command)])
    )
    monkeypatch.setattr(sys, "argv", ["demo", "--quick", *words])
    launch_demo.main()
    (command,) = commands
    assert str(ROOT / "examples" / script) in command
    assert "--quick" in command
    assert "--framework" not in command
    assert ("0.01" in command) == ("0.01" in words)


def test_launch_demo_hides_mpiruns_tags(capfdbinary: Any) -> None:
    launch_demo = load_launch_demo()
    reader, writer = os.pipe()
    for part in (b"a [1]\n[1,0]<stdo", b"ut>:b\r[1,1]<stderr>:", b"c\n["):
        os.write(writer, part)
    os.close(writer)
    launch_demo.show_without_tags(reader)
    os.close(reader)
    assert capfdbinary.readouterr().out == b"a [1]\nb\rc\n["


def load_launch_demo() -> Any:
    """The script as a module; it has no suffix."""
    sys.path.insert(0, str(ROOT / "launch"))
    try:
        loader = machinery.SourceFileLoader("launch_demo", str(ROOT / "launch" / "demo"))
        module = util.module_from_spec(util.spec_from_loader("launch_demo", loader))
        loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "launch"))
    return module
