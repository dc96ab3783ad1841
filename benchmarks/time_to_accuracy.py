"""Time to accuracy: real trainings on four ranks, this package next to Horovod and DDP.

    python benchmarks/time_to_accuracy.py --data FOLDER --text FILE --out tta   about ten hours
    python benchmarks/time_to_accuracy.py ... --tasks images --ways "Horovod dense" momentum
    python benchmarks/time_to_accuracy.py ... --time       seconds a step on virtual hosts, as root
    python benchmarks/time_to_accuracy.py ... --quick      a few minutes: short runs, few ways
    python benchmarks/time_to_accuracy.py --report --out tta      table and plots

Tasks are a residual network on CIFAR-10 and a transformer on a text. Each way is tried at each
learning rate of a small grid by runs of a quarter of the length, then trained with three seeds at
its best rate. Runs that tta.jsonl has already are left out, so an interrupted command goes on where
it was. Seconds on a network are steps x the time of a step, measured on four virtual hosts on the
same machine. Files for the ranks lie in the folder tta/.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bandwidth import RING, line
from time_to_accuracy_plan import RANKS, TASKS, Results, Run, best_rate, read, read_times, runs
from time_to_accuracy_report import plots, table
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
_QUICK = {"images": ("Horovod dense", "momentum, signs"), "text": ("Horovod dense, AdamW",)}
_LIMIT_SECONDS = 3 * 3600
_TIMED_STEPS = 20


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="CIFAR-10")
    parser.add_argument("--text", type=Path, metavar="FILE", help="text of some megabytes, or .xz")
    parser.add_argument("--out", type=Path, default=Path("tta"), metavar="NAME")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--ways", nargs="+", default=[""], help="that contain a word of these")
    parser.add_argument("--first-seed", action="store_true", help="leave out the other seeds")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of epochs (1)")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--time", action="store_true", help="seconds a step on virtual hosts")
    parser.add_argument("--networks", nargs="+", default=["100mbit", "1gbit"], metavar="RATE")
    parser.add_argument("--repeat", type=int, default=3, help="of timings, in turn (3)")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--list", action="store_true", help="only say what is missing now")
    parser.add_argument("--report", action="store_true", help="only table and plots")
    return parser.parse_args(words)


def prepare(options: argparse.Namespace, folder: Path) -> None:
    """Put what ranks read into a folder: decoded images, the text."""
    folder.mkdir(parents=True, exist_ok=True)
    if "images" in options.tasks and not (folder / "images-test_labels.npy").exists():
        from experiments.images import load_cifar10

        if options.data is None:
            raise SystemExit("time_to_accuracy.py: got no --data, expected a folder of CIFAR-10")
        images = load_cifar10(options.data, halve=False)
        for name in ("train", "train_labels", "test", "test_labels"):
            np.save(folder / f"images-{name}.npy", getattr(images, name))
    if "text" in options.tasks and not (folder / "text").exists():
        if options.text is None:
            raise SystemExit("time_to_accuracy.py: got no --text, expected a file")
        import lzma

        opener: Any = lzma.open if options.text.suffix == ".xz" else open
        with opener(options.text, "rb") as source, open(folder / "text", "wb") as copy:
            shutil.copyfileobj(source, copy)


def measure(
    run: Run, options: argparse.Namespace, *, timed_steps: int = 0, network: str = ""
) -> dict[str, Any]:
    """One training, or one timing on virtual hosts; raises if it fails."""
    with tempfile.TemporaryDirectory(prefix="tta-") as scratch:
        job, out = Path(scratch) / "job.json", Path(scratch) / "out.json"
        content = {"run": run, "folder": str(options.out.absolute()), "out": str(out)}
        content |= {"precision": options.precision, "timed_steps": timed_steps}
        content |= {"address": "10.77.0.1" if network else "127.0.0.1", "port": _free_port()}
        job.write_text(json.dumps(content))
        program = HERE / "time_to_accuracy_rank.py"
        if network:
            from ef_horovod.common.units import read_rate

            command = line("ring", RANKS, read_rate(network), program, [str(job)])
        else:
            mpirun = Path(sys.executable).parent / "mpirun"
            start = [str(mpirun) if mpirun.exists() else "mpirun", "-np", str(RANKS)]
            command = [*start, "--bind-to", "none", sys.executable, str(program), str(job)]
        with open(options.out / "log", "w") as log:
            both: Any = {"stdout": log, "stderr": log, "start_new_session": True}
            process = subprocess.Popen(command, env=_environment(bool(network)), **both)
            try:
                status = process.wait(_LIMIT_SECONDS)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGTERM)
            if status or not out.exists():
                raise SystemExit(f"{run.label} ended with status {status}; see {log.name}")
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(cluster: bool) -> dict[str, str]:
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "NUMBA")}
    folders = [str(HERE.parent), str(HERE.parent / "launch"), os.environ.get("PYTHONPATH")]
    path = {"PYTHONPATH": os.pathsep.join(filter(None, folders))}
    mpi = {"OMPI_MCA_rmaps_base_oversubscribe": "1", "OMPI_MCA_mpi_yield_when_idle": "1"}
    interface = {"GLOO_SOCKET_IFNAME": "eth0" if cluster else "lo"}
    return {**os.environ, **threads, **mpi, **RING, **interface, **path}


def train_all(options: argparse.Namespace, file: Path) -> None:
    """All runs that the file does not have yet, with a bar."""
    results: Results = read(file)
    words = options.ways
    for task in options.tasks:
        chosen = [w for w in _QUICK[task] if words == [""]] if options.quick else words
        bar = tqdm(runs(results, [task], chosen or words, options.scale), unit="run", disable=None)
        for run in bar:
            if options.first_seed and run.seed:
                continue
            bar.set_description(run.label)
            row = {**run._asdict(), "precision": options.precision, **measure(run, options)}
            results[run] = row
            with open(file, "a") as lines:
                lines.write(json.dumps(row) + "\n")


def time_all(options: argparse.Namespace, file: Path) -> None:
    """Seconds of a step of each way that was trained, on each network, in turn."""
    results = read(file)
    wanted = [
        (Run(task, way, rate, 1, 0), network)
        for _ in range(options.repeat)
        for task in options.tasks
        for network in options.networks
        for way in TASKS[task].ways
        if any(word in way for word in options.ways)
        and (rate := best_rate(results, task, way, max(1, epochs_of(task, options) // 4)))
    ]
    for run, network in tqdm(wanted, unit="timing", disable=None):
        found = measure(run, options, timed_steps=_TIMED_STEPS, network=network)
        row = {"task": run.task, "way": run.way, "network": network, **found}
        with open(file, "a") as lines:
            lines.write(json.dumps(row) + "\n")


def epochs_of(task: str, options: argparse.Namespace) -> int:
    """Of a run of full length."""
    return max(1, round(options.scale * TASKS[task].epochs))


def report(options: argparse.Namespace, file: Path) -> None:
    """Print tables, and draw plots where something was trained."""
    results, times = read(file), read_times(file)
    for task in options.tasks:
        epochs = epochs_of(task, options)
        if any(run.task == task and run.epochs == epochs for run in results):
            print(table(results, times, task, epochs) + "\n")
            print(plots(results, times, task, epochs, options.out))


def main(words: Sequence[str]) -> int:
    # So that whoever ends this ends its ranks, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = parse(words)
    if options.quick:
        options.scale = min(options.scale, 1 / 16)
    file = options.out.with_suffix(".jsonl")
    if options.list:
        results = read(file)
        for run in runs(results, options.tasks, options.ways, options.scale):
            print(run.label)
        return 0
    if not options.report:
        prepare(options, options.out)
        (time_all if options.time else train_all)(options, file)
    report(options, file)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
