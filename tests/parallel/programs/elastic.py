"""An elastic training: ranks come and go as the script of hosts says, which rank 0 rewrites.

Arguments: the numbers of ranks in turn, such as 2,3,2; the method; the exchange; and "committed",
"checked" for a training that rarely commits, or "killed" for one whose last rank ends by itself.
"""

from __future__ import annotations

import json
import os
import signal
import time

import horovod.torch as hvd
import torch
from common import ARGUMENTS, OUT
from torch_common import batches, build_model, digest

import ef_horovod.torch as ef

SIZES = [int(size) for size in ARGUMENTS[0].split(",")]
METHOD, EXCHANGE, WAY = ARGUMENTS[1:]
HELD = 6  # steps with each number of ranks
TOP = ef.TopK(ratio=0.05)
METHODS = {
    "ef": ef.ErrorFeedback(TOP),
    "ef21": ef.EF21(TOP, momentum=0.5),
    "both ways": ef.DoubleSqueeze(TOP, server_compressor=TOP),
}


def note(**facts: object) -> None:
    """Add a line to this process's own file."""
    with (OUT / f"process{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps({"size": hvd.size(), "rank": hvd.rank(), **facts}) + "\n")


def held_back(optimizer: ef.DistributedOptimizer) -> dict[str, float]:
    """Sums of the merged memory, and its step; collective."""
    state = optimizer.merged_state_dict()
    sums = {
        f"{name} {key}": float(value.astype("float64").sum())
        for name, fields in state["parameters"].items()
        for key, value in fields.items()
        if hasattr(value, "sum")
    }
    return sums | {"step": state["step"]}


def main() -> None:
    hvd.init()
    model = build_model()
    # Weight decay moves the parameters of a rank that makes its state by a step.
    inner = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    optimizer = ef.DistributedOptimizer(
        inner, model.named_parameters(), compression=METHODS[METHOD], bucket_bytes=8000,
        exchange=EXCHANGE,
    )  # fmt: skip
    next_batch = batches(hvd.rank())
    state = hvd.elastic.TorchState(model=model, optimizer=optimizer, step=0, phase=0, held=0)

    def next_phase() -> None:
        state.phase, state.held = state.phase + 1, 0
        if WAY == "killed" and hvd.local_size() == 1 < hvd.size():  # alone on its host
            os.kill(os.getpid(), signal.SIGKILL)
        if WAY != "killed" and hvd.rank() == 0:
            (OUT / "hosts").write_text(f"localhost:{SIZES[state.phase]}\n")

    @hvd.elastic.run
    def train(state: hvd.elastic.TorchState) -> None:
        note(begins=digest(model), at=state.step, held_back=held_back(optimizer))
        while True:
            if state.held >= HELD:
                if state.phase + 1 == len(SIZES):
                    return
                next_phase()
                state.save()  # not commit(), which may raise here
            inputs, labels = next_batch()
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            state.step += 1
            state.held += hvd.size() == SIZES[state.phase]
            note(now=digest(model), at=state.step, held_back=held_back(optimizer))
            if hvd.size() != SIZES[state.phase]:
                time.sleep(0.1)  # for the driver to notice
            if WAY == "checked":
                state.check_host_updates()
            else:
                state.commit()

    train(state)
    note(ends=digest(model), at=state.step, held_back=held_back(optimizer))


main()
