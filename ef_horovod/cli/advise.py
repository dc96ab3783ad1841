"""`ef-horovod advise`: predicts the cost per step of each choice and recommends one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from tabulate import tabulate

from ef_horovod.cli.evidence import SOURCE, UPDATES, evidence_of
from ef_horovod.common.units import show_rate, show_seconds
from ef_horovod.cost import model
from ef_horovod.cost.model import Cost
from ef_horovod.cost.probe import measure_work
from ef_horovod.exchange.network import SOFTWARE, Network, Software, Work
from ef_horovod.methods.base import Method
from ef_horovod.methods.parsing import read_method
from ef_horovod.training.choice import wants_server
from ef_horovod.training.updates import refuse_for_updates

USUAL_METHODS = (
    "ErrorFeedback(Then(TopK(0.01), OneBit()))",
    "ErrorFeedback(OneBit())",
    "ErrorFeedback(TopK(0.01))",
    "EF21(TopK(0.01))",
    "DoubleSqueeze(OneBit(), server_compressor=OneBit())",
)
_SAVING = 0.9  # a choice is recommended if it takes less than this part of a dense step
_PLAIN = "Horovod, "  # prefix of rows without this library


@dataclass(frozen=True)
class Question:
    """The input of `advise`.

    Args:
        parameters: number of compressed parameters.
        workers: numbers of workers to compare.
        network: between the nodes, with the number of workers on each.
        methods: methods to compare.
        compute: seconds of forward and backward; None if unknown.
        software: a key of `exchange.network.SOFTWARE`.
        bucket_bytes: bytes of float32 per compressed bucket.
        share: workers per core.
        measured: True to measure this machine's speeds; False for the reference machine's.
        exchanges: names of those to compare; () for all. "hierarchical" is all of that name.
        local_steps: steps per exchange, of `ef.CompressedUpdates`.
    """

    parameters: int
    workers: Sequence[int]
    network: Network
    methods: Sequence[Method]
    compute: float | None = None
    software: str = "default"
    bucket_bytes: int = 25 * 2**20
    share: float = 1.0
    measured: bool = True
    exchanges: Sequence[str] = ()
    local_steps: int = 1

    def exchanges_of(self, method: Method) -> list[str]:
        """The exchanges to compare that a method can use."""
        per_node = self.network.workers_per_node
        by_nodes = ["hierarchical:server"] if per_node > 1 and method.sliceable else []
        possible = [*model.possible_exchanges(method, per_node), "server", *by_nodes]
        asked = self.exchanges or possible
        return [name for name in possible if name in asked or name.partition(":")[0] in asked]

    def require_nodes(self) -> None:
        """Check that nodes have equally many workers.

        Raises:
            ValueError: they do not.
        """
        per_node = self.network.workers_per_node
        for workers in self.workers:
            if workers % per_node:
                raise ValueError(
                    f"got --workers {workers} with --ranks-per-node {per_node}, expected equally "
                    f"many workers on each node; take a multiple of {per_node} workers, or another "
                    "--ranks-per-node (the mean, if your nodes are unequal)"
                )

    def require_exchanges(self) -> None:
        """Check that each asked exchange has a method.

        Raises:
            ValueError: one has none.
        """
        every = replace(self, exchanges=())
        possible = dict.fromkeys(name for m in self.methods for name in every.exchanges_of(m))
        for name in self.exchanges:
            if not any(name in (one, one.partition(":")[0]) for one in possible):
                more = "" if self.network.workers_per_node > 1 else "or give --ranks-per-node, "
                raise ValueError(
                    f"got --exchange {name}, expected one that a method here can use: "
                    f"{', '.join(possible)}; take one of these, {more}or leave --exchange out"
                )


class Choice(NamedTuple):
    """A row of the table."""

    name: str
    method: Method | None  # None: Horovod alone
    cost: Cost
    versus_dense: float  # time of the best dense step divided by this one's


class Answer(NamedTuple):
    """Choices for a number of workers, best first."""

    workers: int
    choices: list[Choice]
    local_steps: int = 1  # per exchange

    @property
    def verdict(self) -> str:
        """The recommendation in one sentence."""
        dense, best = self.dense, self.choices[0]
        step, of_dense = show_seconds(best.cost.step), show_seconds(dense.cost.step)
        if best.cost.step >= _SAVING * dense.cost.step:
            return (
                f"stay dense: nothing is predicted to take less than {_SAVING:.0%} of the "
                f"{of_dense} of a dense step"
            )
        gain = (
            f"a step of {step} in place of {of_dense}, {best.versus_dense:.1f} times as fast as "
            "the best dense one"
        )
        if best.method is None:
            return f"take Horovod's own hvd.Compression.fp16, without this library: {gain}"
        where = " in ef.CompressedUpdates" if self._suits_updates(best) else ""
        if self.local_steps > 1:
            where = f" in ef.CompressedUpdates(local_steps={self.local_steps})"
        return f"take compression={best.method!r}, exchange={best.cost.exchange!r}{where}: {gain}"

    def _suits_updates(self, choice: Choice) -> bool:
        if choice.method is None or wants_server(choice.cost.exchange):
            return False
        return any(e.compressed == UPDATES for e in evidence_of(choice.method))

    @property
    def dense(self) -> Choice:
        """The best choice with a dense float32 allreduce."""
        return next(choice for choice in self.choices if choice.name.startswith(_PLAIN + "dense"))


def read_methods(methods: Sequence[str], compressors: Sequence[Any]) -> list[Method]:
    """Methods from command-line texts; each with each compressor, if any are given.

    Raises:
        ValueError: a text does not name a method.
        UnsupportedError: a method does not accept a compressor.
    """
    if not compressors:
        return [read_method(text) for text in methods or USUAL_METHODS]
    names = methods or ("errorfeedback",)
    return [read_method(text, compressor) for text in names for compressor in compressors]


def advise(question: Question, probe: Callable[[Method, int], Work] = measure_work) -> list[Answer]:
    """The choices for each number of workers.

    Args:
        question: see `Question`.
        probe: measures a method's speeds for a vector length.

    Raises:
        ValueError: a method whose payloads have no known size, an exchange that no method can use,
            or nodes with different numbers of workers.
        UnsupportedError: a method that cannot have local steps.
    """
    question.require_exchanges()
    question.require_nodes()
    if question.local_steps > 1:
        for method in question.methods:
            refuse_for_updates(method)
    lengths = bucket_counts(question.parameters, question.bucket_bytes)
    work = {
        method: (probe if question.measured else model.reference_work)(method, max(lengths))
        for method in question.methods
    }
    return [_answer(question, workers, lengths, work) for workers in question.workers]


def bucket_counts(parameters: int, bucket_bytes: int) -> dict[int, int]:
    """{length: number of buckets} for parameters split into about equal buckets.

    Example:
        >>> bucket_counts(10, 16)
        {4: 1, 3: 2}
    """
    count = min(max(1, -(-4 * parameters // bucket_bytes)), parameters)
    length, longer = divmod(parameters, count)
    counts = {length + 1: longer, length: count - longer}
    return {length: count for length, count in counts.items() if count}


def _answer(
    question: Question, workers: int, lengths: dict[int, int], work: dict[Method, Work]
) -> Answer:
    plain = _plain_costs(question, workers, next(iter(work.values()), None))
    rows: dict[str, tuple[Method | None, Cost]] = {n: (None, cost) for n, cost in plain.items()}
    for method in question.methods:
        for exchange in question.exchanges_of(method):
            cost = _bucketed(question, workers, lengths, method, exchange, work[method])
            # On one node, two levels are the exchange between nodes.
            rows.setdefault(f"{method!r}, {cost.exchange}", (method, cost))
    dense = min(cost.step for name, cost in plain.items() if "dense" in name)
    choices = [Choice(n, method, cost, dense / cost.step) for n, (method, cost) in rows.items()]
    ordered = sorted(choices, key=lambda choice: choice.cost.step)
    return Answer(workers, ordered, question.local_steps)


def _plain_costs(question: Question, workers: int, work: Work | None) -> dict[str, Cost]:
    """Costs of Horovod without this library."""
    d, network, compute = question.parameters, question.network, question.compute or 0.0
    own: dict[str, Any] = {"work": work, "compute": compute, "share": question.share}
    asked = SOFTWARE[question.software]

    def dense(software: Software) -> Cost:
        method = read_method("NoFeedback(Identity())")
        return model.step_cost(method, d, workers, "dense", network, software=software, **own)

    costs = {_PLAIN + "dense": dense(asked)}
    if question.software == "default":
        costs[_PLAIN + "dense by a ring"] = dense(SOFTWARE["ring"])
    return costs | {
        _PLAIN + "fp16": model.half_precision_cost(d, workers, network, software=asked, **own)
    }


def _bucketed(
    question: Question,
    workers: int,
    lengths: dict[int, int],
    method: Method,
    exchange: str,
    work: Work,
) -> Cost:
    """The sum over buckets, which are exchanged one after the other, in one of `local_steps`."""
    costs = {
        d: model.step_cost(
            method,
            d,
            workers,
            exchange,
            question.network,
            software=SOFTWARE[question.software],
            work=work,
            share=question.share,
        )
        for d in lengths
    }
    parts = [(costs[d], count / question.local_steps) for d, count in lengths.items()]
    each = zip(*([count * number for number in p.traffic] for p, count in parts), strict=True)
    moved = type(parts[0][0].traffic)(*map(sum, each))
    names = ("compress", "network", "decode")
    compress, network, decode = (
        sum(count * getattr(p, name) for p, count in parts) for name in names
    )
    through = sum(count * p.node_sent for p, count in parts)
    compute = question.compute or 0.0
    return Cost(parts[0][0].exchange, moved, compute, compress, network, decode, through)


def page(question: Question, answers: Sequence[Answer]) -> str:
    """The table, the verdicts and the assumptions, as text for a terminal."""
    if len(answers) == 1:
        (answer,) = answers
        text = _table(answer, by_node=question.network.workers_per_node > 1)
        verdict = f"Verdict: {answer.verdict}."
    else:
        text = _many(answers)
        verdict = "\n".join(f"{answer.workers:5} workers: {answer.verdict}." for answer in answers)
    return f"{text}\n\n{verdict}\n\n{_learning(question)}\n\n{_assumptions(question)}"


def _learning(question: Question) -> str:
    """What was measured of each method's progress per step, or that nothing was."""
    if question.local_steps > 1:
        return f"Steps: each makes less progress with local steps; {SOURCE} has what was measured."
    rows, unknown = [], []
    for method in question.methods:
        found = evidence_of(method)
        rows += [[e.method, e.compressed, e.training, e.against_dense] for e in found]
        unknown += [] if found else [repr(method)]
    lines = []
    if rows:
        head = ["method", "compressed", "training", "against dense, after equal steps"]
        title = f"Steps, measured ({SOURCE}; updates: ef.CompressedUpdates):"
        lines += [title, "", tabulate(rows, head, disable_numparse=True)]
    if unknown:
        lines += [*([""] if rows else []), f"Steps, not measured: {', '.join(unknown)}"]
    return "\n".join(lines)


def _table(answer: Answer, *, by_node: bool) -> str:
    """One row per choice; `by_node` adds the bytes that a node sends to others."""
    head = ["choice", "bytes out", "bytes in", "compress", "exchange", "decode", "step", "x dense"]
    head[3:3] = ["node's bytes out"] * by_node
    rows = [
        [
            choice.name,
            f"{choice.cost.traffic.sent:,.0f}",
            f"{choice.cost.traffic.received:,.0f}",
            *[f"{choice.cost.node_sent:,.0f}"] * by_node,
            *(show_seconds(getattr(choice.cost, p)) for p in ("compress", "network", "decode")),
            show_seconds(choice.cost.step),
            f"{choice.versus_dense:.2f}",
        ]
        for choice in answer.choices
    ]
    align = ["left", *["right"] * (len(head) - 1)]
    return tabulate(rows, head, colalign=align, disable_numparse=True)


def _many(answers: Sequence[Answer]) -> str:
    """One row per number of workers, one column per method with its best exchange."""
    plain = [c.name for c in answers[0].choices if c.method is None]
    methods = list(dict.fromkeys(c.method for c in answers[0].choices if c.method is not None))
    rows = []
    for answer in answers:
        by_name = {choice.name: choice.cost for choice in answer.choices}
        cells = [show_seconds(by_name[name].step) for name in plain]
        for method in methods:
            cost = next(c.cost for c in answer.choices if c.method == method)
            cells.append(f"{show_seconds(cost.step)} ({cost.exchange})")
        rows.append([answer.workers, *cells])
    head = ["workers", *plain, *map(repr, methods)]
    return tabulate(
        rows, head, colalign=["right"] * len(head), disable_numparse=True,
        maxheadercolwidths=[7] + [20] * (len(head) - 1),
    )  # fmt: skip


def _assumptions(question: Question) -> str:
    network, compute = question.network, question.compute
    buckets = sum(bucket_counts(question.parameters, question.bucket_bytes).values())
    took = "measured on this machine now" if question.measured else "those of the reference machine"
    r, within = network.workers_per_node, show_rate(network.within)
    h = question.local_steps
    lines = [
        f"network: {show_rate(network.bandwidth)} each way and {show_seconds(network.latency)} "
        "from host to host (given)",
        *[f"nodes: {r} workers on each (given), {within} from one to another"] * (r > 1),
        f"software: {SOFTWARE[question.software].name}",
        f"forward and backward: {show_seconds(compute)} (given)"
        if compute is not None
        else "forward and backward: not given (--compute), so a step is what the exchange costs",
        f"speed of a core: {took}; {question.share:g} worker(s) on each",
        f"{question.parameters:,} parameters in {buckets} bucket(s); no overlap with backward",
        *[f"one exchange in {h} local steps (given); Horovod's rows exchange in each"] * (h > 1),
        "the verdict is by time per step; how many steps each one takes is above",
    ]
    return "Predicted, from:\n" + "\n".join(f"  {line}" for line in lines)


def as_json(question: Question, answers: Sequence[Answer]) -> str:
    """The answers as JSON, in seconds and bytes."""
    found = {
        "parameters": question.parameters,
        "network": asdict(question.network),
        "software": question.software,
        "compute": question.compute,
        "workers_per_core": question.share,
        "local_steps": question.local_steps,
        "speeds": "measured" if question.measured else "reference",
        "learning": {
            repr(method): [e._asdict() for e in evidence_of(method)] for method in question.methods
        },
        "answers": [
            {
                "workers": answer.workers,
                "verdict": answer.verdict,
                "choices": [
                    {
                        "choice": choice.name,
                        "exchange": choice.cost.exchange,
                        "bytes_out": choice.cost.traffic.sent,
                        "bytes_in": choice.cost.traffic.received,
                        "node_bytes_out": choice.cost.node_sent,
                        "compress": choice.cost.compress,
                        "network": choice.cost.network,
                        "decode": choice.cost.decode,
                        "step": choice.cost.step,
                        "times_dense": choice.versus_dense,
                    }
                    for choice in answer.choices
                ],
            }
            for answer in answers
        ],
    }
    return json.dumps(found, indent=2)
