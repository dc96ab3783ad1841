"""Memory of a rank beside that of Horovod's dense optimizer, for each method.

    python benchmarks/memory.py                     about five minutes: 2 ranks
    python benchmarks/memory.py --ways "EF21, top-k 1 %" --widths 1024 2048

Each way is a job of real ranks that trains an MLP of each width by SGD with momentum. The peak is
that of the resident set of the largest rank, by the kernel, over six steps after the first two. How
much it grows with the width, over that of the plain `hvd.DistributedOptimizer`, gives the number of
additional vectors of the model's size in float32; the rest is what the imports take once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

DENSE = "Horovod, dense"
_TOP, _SIGNS = "TopK(0.01)", "OneBit()"
WAYS = {  # name: (method, wrapper, exchange)
    DENSE: ("", "", ""),
    "error feedback, 1 bit": (f"ErrorFeedback({_SIGNS})", "DistributedOptimizer", "gather"),
    "error feedback, top-k 1 %": (f"ErrorFeedback({_TOP})", "DistributedOptimizer", "gather"),
    "EF21, top-k 1 %": (f"EF21({_TOP})", "DistributedOptimizer", "gather"),
    "DoubleSqueeze, 1 bit": (
        f"DoubleSqueeze({_SIGNS}, server_compressor={_SIGNS})",
        "DistributedOptimizer",
        "double_pass",
    ),
    "PowerSGD, rank 4": ("PowerSGD(rank=4)", "DistributedOptimizer", "reduce"),
    "momentum, top-k 1 %": (f"MomentumCorrection({_TOP})", "DistributedOptimizer", "gather"),
    "updates, 1 bit": (f"ErrorFeedback({_SIGNS})", "CompressedUpdates", "gather"),
    "updates, 1 bit, 5 local steps": (f"ErrorFeedback({_SIGNS})", "CompressedUpdates", "gather"),
}
_LOCAL_STEPS = {"updates, 1 bit, 5 local steps": 5}
_STEPS, _FIRST_STEPS, _LAYERS, _MB = 6, 2, 6, 1e6


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ways", nargs="+", choices=[*WAYS], default=[*WAYS], metavar="NAME")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--widths", type=int, nargs=2, default=[1000, 2000], help="of each of the 6 layers"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers")
    parser.add_argument("--rank", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    return parser.parse_args(words)


def measure(name: str, width: int, ranks: int) -> dict[str, Any]:
    """One job; the numbers of its largest rank."""
    with tempfile.TemporaryDirectory() as folder:
        mpirun = Path(sys.executable).parent / "mpirun"
        command = [str(mpirun) if mpirun.exists() else "mpirun", "-np", str(ranks)]
        command += [
            "--bind-to",
            "none",
            sys.executable,
            __file__,
            "--widths",
            str(width),
            str(width),
        ]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "OMPI_MCA_rmaps_base_oversubscribe": "1",
            "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
        }
        log = Path(folder, "log")
        with log.open("w") as opened:
            status = subprocess.call(
                [*command, "--rank", name, folder], env=environment, stdout=opened, stderr=opened
            )
        if status:
            raise SystemExit(f"memory.py: {name} ended with status {status}:\n{log.read_text()}")
        found = [json.loads(file.read_text()) for file in Path(folder).glob("rank*")]
    return max(found, key=lambda one: one["peak"])


def run_rank(name: str, folder: str, width: int) -> None:
    """What one rank does."""
    import horovod.torch as hvd
    import torch

    hvd.init()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = [torch.nn.Linear(width, width, bias=False) for _ in range(_LAYERS)]
    model = torch.nn.Sequential(*layers)
    optimizer = _wrapped(name, torch.optim.SGD(model.parameters(), 1e-3, 0.9), model)
    inputs = torch.randn(4, width)
    for step in range(_FIRST_STEPS + _STEPS):
        if step == _FIRST_STEPS:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    found = {
        "peak": int(status["VmHWM"].split()[0]) * 1024,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    Path(folder, f"rank{hvd.rank()}").write_text(json.dumps(found))


def _wrapped(name: str, optimizer: Any, model: Any) -> Any:
    import horovod.torch as hvd

    if name == DENSE:
        return hvd.DistributedOptimizer(optimizer, model.named_parameters())
    import ef_horovod.torch as ef
    from ef_horovod.methods.parsing import read_method

    method, wrapper, exchange = WAYS[name]
    options = {"local_steps": _LOCAL_STEPS[name]} if name in _LOCAL_STEPS else {}
    if name.startswith("momentum"):
        optimizer.param_groups[0]["momentum"] = 0.0
    return getattr(ef, wrapper)(
        optimizer,
        model.named_parameters(),
        compression=read_method(method),
        exchange=exchange,
        **options,
    )


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """One row per way."""
    (small, large) = found[DENSE]
    grown = 4 * (large["parameters"] - small["parameters"])
    rows = []
    for name, (few, many) in found.items():
        more = many["peak"] - few["peak"] - (large["peak"] - small["peak"])
        vectors = more / grown
        once = few["peak"] - small["peak"] - vectors * 4 * small["parameters"]
        rows.append([name, f"{many['peak'] / _MB:,.0f}", f"{vectors:.1f}", f"{once / _MB:,.0f}"])
    head = ["way", "peak of a rank, MB", "more vectors than dense", "once, MB"]
    align = ("left", "right", "right", "right")
    return tabulate(rows, head, colalign=align, disable_numparse=True)


def main(words: Sequence[str]) -> int:
    options = parse(words)
    if options.rank:
        run_rank(*options.rank, options.widths[0])
        return 0
    names = list(dict.fromkeys([DENSE, *options.ways]))
    jobs = [(name, width) for name in names for width in options.widths]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for name, width in tqdm(jobs, unit="job", disable=None):
        found[name].append(measure(name, width, options.ranks))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    few, many = (one["parameters"] for one in found[DENSE])
    print(f"{few:,} and {many:,} parameters, {options.ranks} ranks; peak with {many:,}\n")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
