"""What `benchmarks/bandwidth.py` measures: models, ways to exchange gradients, and the grid.

Nothing here loads a framework. Ways of one group run in one job, one after the other, for starting
eight Pythons with PyTorch on few cores takes longer than measuring. What a step may take is guessed
from bytes and rate: good enough to choose numbers of steps and limits, and for `--list`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ef_horovod.common.units import read_rate, show_rate

IMAGES = 50_000  # of an epoch
RATES = tuple(
    read_rate(text + "bit") for text in ("50m", "100m", "200m", "500m", "1g", "2g", "5g", "10g")
)
HOSTS = (2, 4, 8)  # that train; a server has one more
_FEW_RATES = tuple(read_rate(text + "bit") for text in ("100m", "1g", "10g"))
_START_SECONDS = {"tensorflow": 6.0}  # of each rank, on one core
_OTHER_START_SECONDS = 3.0


@dataclass(frozen=True)
class Model:
    """A network and its batch.

    Args:
        name: for options and tables.
        about: in words.
        parameters: how many numbers.
        batch: samples of a worker in a step.
        seconds: of forward and backward on one core, guessed.
    """

    name: str
    about: str
    parameters: int
    batch: int
    seconds: float


MODELS = {
    model.name: model
    for model in (
        Model("mlp", "784-1536-1536-10, random data", 3_581_962, 32, 0.025),
        Model("cnn", "three convolutions, 512 hidden units, CIFAR-10", 569_882, 32, 0.04),
        Model("embedding", "50,000 x 64, 20 words a text, random data", 3_200_650, 32, 0.015),
    )
}


@dataclass(frozen=True)
class Way:
    """A way to exchange gradients.

    Args:
        name: for options and tables.
        group: of ways that one job can measure: who carries the bytes, and how it was started.
        method: of this package, as `read_method` reads it; "" for other packages.
        exchange: of this package, with RATE for the links'; for others what is asked of them.
        up: bytes that a worker sends for each parameter in one message, for guesses.
        down: bytes of an answer for each parameter, where there are answers.
        passes: how often a ring or an all-to-all carries it; 0 for one message to each other rank.
    """

    name: str
    group: str
    method: str = ""
    exchange: str = "auto"
    up: float = 4.0
    down: float = 0.0
    passes: float = 2.0

    @property
    def ours(self) -> bool:
        return bool(self.method)

    def exchange_on(self, rate: int) -> str:
        """The exchange to ask for, on links of so many bits per second."""
        return self.exchange.replace("RATE", f"{rate}bit")

    def link_bytes(self, parameters: int, hosts: int) -> float:
        """What the busiest link carries in one direction in a step, guessed."""
        if self.group == "server":
            return hosts * max(self.up, self.down) * parameters
        if self.passes:
            return self.passes * (hosts - 1) / hosts * max(self.up, self.down) * parameters
        return (hosts - 1) * self.up * parameters


_TOPK, _ONEBIT, _TERNARY, _RANK4 = 0.0503, 0.126, 0.2, 0.016  # bytes a parameter
_DS1, _DSK = (
    "DoubleSqueeze(OneBit(), server_compressor=OneBit())",
    "DoubleSqueeze(TopK(0.01), server_compressor=TopK(0.01))",
)
_TOPK_SGD = "NoFeedback(TopK(0.01), server_compressor=TopK(0.01))"
_EF21_BOTH = "EF21(TopK(0.01), server_compressor=TopK(0.01))"
_SIGNS = "ErrorFeedback(Then(TopK(0.01), OneBit()))"
_EF21_NATURAL = "EF21(Then(TopK(0.01), Natural()))"
_MEM_TOPK = "ErrorFeedback(TopK(0.01))"
_GATHER, _DOUBLE, _BY_NODE = "gather", "double_pass", "hierarchical"

WAYS = {
    way.name: way
    for way in (
        Way("Horovod dense, default", "default", passes=4.0),
        Way("no exchange", "ddp", passes=0.0, up=0.0),
        Way("Horovod dense, ring", "ring"),
        Way("Horovod fp16, ring", "ring", up=2.0),
        Way("EF21 top-k", "ring", "EF21(TopK(0.01))", _GATHER, _TOPK, passes=0),
        Way("EF21 top-k, natural", "ring", _EF21_NATURAL, _GATHER, 0.0216, passes=0),
        Way("EF21 top-k, double pass", "ring", _EF21_BOTH, _DOUBLE, _TOPK, _TOPK),
        Way("EF21 top-k, auto", "ring", "EF21(TopK(0.01))", "auto:RATE", _TOPK, passes=0),
        Way("DoubleSqueeze 1 bit, gather", "ring", _DS1, _GATHER, _ONEBIT, passes=0),
        Way("DoubleSqueeze 1 bit", "ring", _DS1, _DOUBLE, _ONEBIT, _ONEBIT),
        Way("DoubleSqueeze top-k", "ring", _DSK, _DOUBLE, _TOPK, _TOPK),
        Way("MEM-SGD 1 bit", "ring", "ErrorFeedback(OneBit())", _GATHER, _ONEBIT, passes=0),
        Way("MEM-SGD top-k", "ring", _MEM_TOPK, _GATHER, _TOPK, passes=0),
        Way("MEM-SGD signs of 1 %", "ring", _SIGNS, _GATHER, 0.012, passes=0),
        Way("QSGD", "ring", "NoFeedback(TernGrad())", _GATHER, _TERNARY, passes=0),
        Way("Top-k SGD", "ring", _TOPK_SGD, _DOUBLE, _TOPK, _TOPK),
        Way("PowerSGD rank 4", "ring", "PowerSGD(rank=4)", "reduce", _RANK4),
        Way("EF21 top-k, stock optimizer", "ring", "EF21(TopK(0.01))", "stock", _TOPK, passes=0),
        Way("EF21 top-k, by nodes", "ring", "EF21(TopK(0.01))", _BY_NODE, _TOPK, passes=0),
        Way("MEM-SGD top-k, by nodes", "ring", _MEM_TOPK, _BY_NODE, _TOPK, passes=0),
        Way("DDP dense", "ddp"),
        Way("DDP fp16", "ddp", up=2.0),
        Way("DDP PowerSGD rank 4", "ddp", up=2 * _RANK4),
        Way("TensorFlow: Horovod dense", "tensorflow"),
        Way("TensorFlow: EF21 top-k", "tensorflow", "EF21(TopK(0.01))", _GATHER, _TOPK, passes=0),
        Way("server: uncompressed", "server", "NoFeedback(Identity())", "server", 4.0, 4.0),
        Way("server: DoubleSqueeze 1 bit", "server", _DS1, "server", _ONEBIT, _ONEBIT),
        Way("server: DoubleSqueeze top-k", "server", _DSK, "server", _TOPK, _TOPK),
        Way("server: MEM-SGD 1 bit", "server", "ErrorFeedback(OneBit())", "server", _ONEBIT, 4.0),
        Way("server: MEM-SGD top-k", "server", "ErrorFeedback(TopK(0.01))", "server", _TOPK, 4.0),
        Way("server: QSGD", "server", "NoFeedback(TernGrad())", "server", _TERNARY, 4.0),
        Way("server: Top-k SGD", "server", _TOPK_SGD, "server", _TOPK, _TOPK),
    )
}
GROUPS = tuple(dict.fromkeys(way.group for way in WAYS.values()))
# Enough to compare with, where not the whole grid is measured.
FEW_WAYS = (
    "no exchange",
    "Horovod dense, ring",
    "Horovod fp16, ring",
    "EF21 top-k",
    "EF21 top-k, natural",
    "EF21 top-k, double pass",
    "EF21 top-k, auto",
    "DoubleSqueeze 1 bit, gather",
    "DoubleSqueeze 1 bit",
    "PowerSGD rank 4",
    "DDP dense",
    "DDP PowerSGD rank 4",
    "server: DoubleSqueeze 1 bit",
)
# Of interest with several ranks on a host; the first two with one are gathers.
SEVERAL_WAYS = (
    "EF21 top-k, by nodes",
    "MEM-SGD top-k, by nodes",
    "MEM-SGD top-k",
    "Horovod dense, ring",
    "Horovod fp16, ring",
    "DDP dense",
    "DDP fp16",
    "DDP PowerSGD rank 4",
)
QUICK_WAYS = ("Horovod dense, ring", "EF21 top-k", "DoubleSqueeze 1 bit")


class Case(NamedTuple):
    """One configuration."""

    model: str
    way: str
    hosts: int
    rate: int  # bits per second
    per_host: int = 1  # ranks on each host

    @property
    def ranks(self) -> int:
        """That train."""
        return self.hosts * self.per_host

    @property
    def label(self) -> str:
        several = f" of {self.per_host} ranks" if self.per_host > 1 else ""
        return f"{self.model}, {self.hosts} hosts{several}, {show_rate(self.rate)}: {self.way}"

    def step_seconds(self) -> float:
        """Of a step, guessed: computing on shared cores, and then the link."""
        model, way = MODELS[self.model], WAYS[self.way]
        crowd = max(1.0, self.ranks / (os.cpu_count() or 1))
        computing = crowd * (model.seconds + (0.01 + 4e-9 * model.parameters))
        bytes_ = way.link_bytes(model.parameters, self.hosts)
        if way.exchange == _GATHER:  # each rank's message goes to each rank of the other hosts
            bytes_ *= self.per_host**2
        return computing + 8 * bytes_ / self.rate

    def seconds(self, budget: Budget) -> float:
        """Of the whole measurement, guessed."""
        step = self.step_seconds()
        return 0.5 + step * (warm_up(self.way, step) + budget.steps(step))


class Budget(NamedTuple):
    """How many steps are timed."""

    fewest: int = 3  # whatever they take
    enough: int = 8  # unless that takes more than `most_seconds`
    seconds: float = 2.0  # of steps, where they are short
    most_seconds: float = 16.0
    most: int = 40

    def steps(self, step: float) -> int:
        """Steps to time if one takes so many seconds."""
        wanted = min(max(self.enough, math.ceil(self.seconds / step)), self.most)
        return max(self.fewest, min(wanted, int(self.most_seconds / step)))


QUICK_BUDGET = Budget(fewest=2, enough=3, seconds=0.3, most_seconds=4.0, most=5)


def warm_up(way: str, step: float) -> int:
    """Steps before the timed ones; PyTorch's PowerSGD starts with two dense ones."""
    if way == "DDP PowerSGD rank 4":
        return 5
    return 1 if step > 5 else 2 if step > 1 else 3


def grid(
    models: Sequence[str],
    hosts: Sequence[int],
    rates: Sequence[int],
    ways: Sequence[str],
    *,
    every: bool,
    per_host: Sequence[int] = (1,),
) -> list[Case]:
    """The configurations to measure.

    Args:
        models, hosts, rates, ways, per_host: to choose from.
        every: all combinations; otherwise those that tell most: the MLP on 4 hosts in full, fewer
            ways and rates on 2 and 8 hosts and of the embedding, the CNN on 4 hosts.
    """
    cases = [
        Case(model, way, count, rate, ranks)
        for ranks in per_host
        for model in models
        for count in hosts
        for rate in rates
        for way in ways
        if _can_have(way, ranks)
    ]
    return cases if every else [case for case in cases if _tells(case)]


def _can_have(way: str, per_host: int) -> bool:
    """Whether a way runs with this number of ranks on a host, and repeats no other way."""
    if per_host == 1:
        return WAYS[way].exchange != _BY_NODE
    return WAYS[way].group != "server"


def _tells(case: Case) -> bool:
    if case.per_host > 1:
        return case.model == "mlp" and case.way in SEVERAL_WAYS
    if case.hosts == 4 and case.model != "embedding":
        return case.model == "mlp" or WAYS[case.way].group != "tensorflow"
    if case.model == "mlp" or case.hosts == 4:
        return case.way in FEW_WAYS and case.rate in _FEW_RATES
    return False


def jobs(cases: Iterable[Case]) -> list[tuple[str, int, list[Case]]]:
    """Group, number of hosts that train, and the configurations that one job measures."""
    found: dict[tuple[int, int, str], list[Case]] = {}
    for case in cases:
        found.setdefault((case.hosts, case.per_host, WAYS[case.way].group), []).append(case)
    order = sorted(found, key=lambda key: (*key[:2], GROUPS.index(key[2])))
    return [
        (key[2], key[0], sorted(found[key], key=lambda case: (-case.rate, case.model)))
        for key in order
    ]


def start_seconds(group: str, ranks: int) -> float:
    """Until a job's ranks are there, guessed."""
    each = _START_SECONDS.get(group, _OTHER_START_SECONDS)
    return 3.0 + each * (ranks + (group == "server")) / (os.cpu_count() or 1)


def total_seconds(cases: Sequence[Case], budget: Budget) -> float:
    """Of all of it, guessed."""
    starts = sum(start_seconds(group, wanted[0].ranks) for group, _, wanted in jobs(cases))
    return starts + sum(case.seconds(budget) for case in cases)


def epoch_seconds(case: Case, step: float) -> float:
    """Of the steps that 50,000 samples make."""
    return step * math.ceil(IMAGES / (MODELS[case.model].batch * case.ranks))


def case_of(row: dict[str, Any]) -> Case:
    """What a row of results is of."""
    return Case(**{field: row[field] for field in Case._fields if field in row})


def lines_of(file: Path) -> list[dict[str, Any]]:
    """What a file of results says, line by line; a half written line is skipped."""
    found = []
    for line in file.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def not_in(out: Path, cases: Sequence[Case]) -> list[Case]:
    """The cases without a row in a file. Each row counts for one repetition of its case."""
    left = list(cases)
    for row in lines_of(out):
        if row.get("ok") and case_of(row) in left:
            left.remove(case_of(row))
    return left


def rows_of(file: Path) -> list[dict[str, Any]]:
    """A row for each case in a file of results: the middle one, or the last one if that failed."""
    found: dict[Case, list[dict[str, Any]]] = {}
    for line in lines_of(file):
        if "ok" in line:
            found.setdefault(case_of(line), []).append(line)
    return [_middle(rows) for rows in found.values()]


def _middle(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of several measurements of a case that of median time, the slower one of two."""
    if not rows[-1]["ok"]:
        return rows[-1]
    good = sorted((row for row in rows if row["ok"]), key=lambda row: row["median"])
    return good[len(good) // 2]
