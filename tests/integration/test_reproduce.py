"""`launch/reproduce NAME --quick`: every experiment runs to its end and leaves its files.

With the papers' data (see tests/unit/test_theory_golden.py) the claims have to hold as well;
without them, made-up data of the same kind show that everything runs.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import BIN, ENVIRONMENT

ROOT = Path(__file__).parents[2]
REAL = Path(os.environ.get("EF_HOROVOD_DATA") or ROOT.parent / "shared" / "data")
NAMES = ("doublesqueeze", "ecx", "ef21", "ef21-variants", "ef21-w", "hard-threshold", "saddle")
SECONDS = 60  # of one core: what else runs on a machine does not count

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The papers' data, or made-up ones."""
    if (REAL / "libsvm" / "a9a.txt.gz").is_file():
        return REAL
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, features in (("phishing", 68), ("mushrooms", 112), ("a9a", 123), ("w8a", 300)):
        write_libsvm(folder / f"{name}.txt.gz", rng, features)
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        rows = rng.integers(0, 256, (2000, 1 + 3 * 32 * 32), np.uint8)
        rows[:, 0] %= 10
        rows.tofile(folder / name)
    return folder


def write_libsvm(path: Path, rng: np.random.Generator, features: int, rows: int = 2000) -> None:
    true = rng.normal(size=features)
    with gzip.open(path, "wt") as file:
        for _ in range(rows):
            present = np.flatnonzero(rng.random(features) < 0.2)
            label = "+1" if true[present].sum() + rng.normal() > 0 else "-1"
            file.write(f"{label} {' '.join(f'{i + 1}:1' for i in present)}\n")


@pytest.mark.parametrize("name", NAMES)
def test_a_quick_run_in_one_process(name: str, data: Path, tmp_path: Path) -> None:
    before = seconds_of_children()
    run = start(name, data, tmp_path)
    assert seconds_of_children() - before < SECONDS
    check(name, data, tmp_path, run)


@pytest.mark.parametrize(
    ("name", "ranks"), [pytest.param("saddle", 4, marks=pytest.mark.exhaustive), ("server", 5)]
)
def test_a_quick_run_of_processes(name: str, ranks: int, data: Path, tmp_path: Path) -> None:
    before = seconds_of_children()
    run = start(name, data, tmp_path, str(BIN / "mpirun"), "-np", str(ranks), words=["--mpi"])
    assert seconds_of_children() - before < SECONDS
    check(name, data, tmp_path, run)


def test_a_server_needs_ranks(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launch" / "reproduce"), "server", "--local"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 2
    assert "got server with --local, expected it alone" in run.stderr


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("ef21", [], "found no phishing.txt.gz in "),
        ("doublesqueeze", [], "found no test_batch.bin in "),
        ("hard-threshold", [], "found no test_batch.bin in "),
        ("server", [], "got 1 rank, expected 5"),
        ("ef21", ["--out", "file/below"], "where nothing can be written (Not a directory)"),
    ],
)
def test_what_cannot_run_is_one_sentence(name, words, said, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = start(name, tmp_path, tmp_path / "out", words=words, cwd=tmp_path)
    refused(run, said)


def test_data_that_cannot_be_read_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "phishing.txt.gz").write_bytes(gzip.compress(b"1 1:1\n-1 2:1\n")[:20])
    (tmp_path / "test_batch.bin").write_bytes(bytes(100))
    for name, said in (("ef21", "phishing.txt.gz, which cannot be read"), ("saddle", "batches in")):
        refused(start(name, tmp_path, tmp_path / "out"), said)


def test_of_many_ranks_one_says_why_the_experiment_cannot_run(tmp_path: Path) -> None:
    mpirun = [str(BIN / "mpirun"), "--quiet", "-np", "4"]
    refused(start("ef21", tmp_path, tmp_path, *mpirun, words=["--mpi"]), "found no phishing.txt.gz")


def refused(run: subprocess.CompletedProcess, said: str) -> None:
    """One sentence on stderr and the status of what cannot run."""
    assert run.returncode == 2
    assert run.stderr.startswith("experiments: error: ")
    assert said in run.stderr
    assert run.stderr.count("\n") == 1, run.stderr


def seconds_of_children() -> float:
    used = os.times()
    return used.children_user + used.children_system


def start(
    name: str,
    data: Path,
    out: Path,
    *launcher: str,
    words: list[str] | None = None,
    cwd: Path = ROOT,
) -> subprocess.CompletedProcess:
    """As launch/reproduce does it, without making an environment."""
    command = [*launcher, sys.executable, "-m", "experiments", name, "--quick"]
    command += ["--data", str(data), "--out", str(out), *(words or [])]
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return subprocess.run(
        command,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": path},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
    )


def check(name: str, data: Path, out: Path, run: subprocess.CompletedProcess) -> None:
    """One verdict for each claim, in the terminal and the files; the status says if all hold."""
    assert (out / f"{name}.png").stat().st_size > 10_000, run.stderr
    page, content = (out / f"{name}.md").read_text(), json.loads((out / f"{name}.json").read_text())
    assert "| claim" in run.stdout
    text, summary = run.stdout.strip().rsplit("\n\n", 1)
    assert text in page
    claims = content["claims"]
    assert claims
    assert all(claim["measured"] for claim in claims)
    failed = [claim for claim in claims if not claim["holds"]]
    assert summary.startswith(f"{len(claims) - len(failed)} of {len(claims)} claims hold")
    in_one_process = "--mpi" not in run.args  # mpirun would take a 1 for a rank that failed
    assert run.returncode == (1 if failed and in_one_process else 0), run.stderr
    assert data != REAL or not failed
