"""Four ranks save their error-feedback state; three of them load it and go on."""

from __future__ import annotations

import horovod.torch as hvd
import numpy as np
import torch
from common import OUT, error_of, report
from torch_common import batches, build_model, digest, train

import ef_horovod.torch as ef
from ef_horovod.training.state_file import unpack

TOP = ef.TopK(ratio=0.05)
METHODS = {
    "error feedback": ef.ErrorFeedback(TOP),
    "both ways": ef.DoubleSqueeze(TOP, server_compressor=TOP),
    "ef21": ef.EF21(TOP, momentum=0.3),
    "momentum": ef.MomentumCorrection(TOP),
    "low rank": ef.PowerSGD(rank=2),
}


def wrapped(method, process_set=None, **options):
    model = build_model()
    decay = 1e-3 if isinstance(method, ef.MomentumCorrection) else 0.0
    inner = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=decay)
    named = model.named_parameters()
    return model, ef.DistributedOptimizer(
        inner, named, compression=method, process_set=process_set, **options
    )


def memories(optimizer):
    """{parameter and field: float64 vector} of this rank, for those that each worker has."""
    state = optimizer.compression_state_dict()["parameters"]
    return {
        f"{name} {field}": np.asarray(value, np.float64)
        for name, fields in state.items()
        for field, value in fields.items()
        if field in ("worker.error", "worker.tracked", "worker.accumulation", "worker.velocity")
    }


def mean_of(optimizer, process_set):
    """The mean of all ranks' memories, as one vector."""
    mine = memories(optimizer)
    vector = torch.from_numpy(np.concatenate([mine[name] for name in sorted(mine)]))
    return hvd.allreduce(vector, name="mean", op=hvd.Average, process_set=process_set).numpy()


def main() -> None:
    three = hvd.ProcessSet([0, 1, 2])
    hvd.init(process_sets=[three])
    results = {}
    for name, method in METHODS.items():
        file = OUT / f"{name}.ef"
        model, optimizer = wrapped(method, bucket_bytes=8000)
        train(model, optimizer, batches(hvd.rank()), 6)
        ef.save(file, optimizer)
        saved = unpack(file.read_bytes(), name)
        before = mean_of(optimizer, hvd.global_process_set)
        found = {"step": saved["step"], "size": saved["size"]}
        if hvd.rank() == 3 and name != "momentum":  # outside of the set: writes and reads nothing
            ef.save(file, wrapped(method, three)[1])
            ef.load(OUT / "no such file", wrapped(method, three)[1])
        if hvd.rank() < 3:
            exchange = "auto" if name == "low rank" else "double_pass"
            restored, again = wrapped(method, three, exchange=exchange)
            if name == "error feedback":
                found |= refusals(file, again, wrapped(METHODS["ef21"], three)[1])
            ef.load(file, again)
            if exchange == "auto":  # slices have other names than whole vectors
                after = mean_of(again, three)
                found["difference"] = float(np.abs(after - before).max() / np.abs(before).max())
            copy = again.merged_state_dict()
            found["same"] = all(
                np.allclose(value, saved["parameters"][p][key], rtol=1e-6, atol=1e-7)
                for p, fields in copy["parameters"].items()
                for key, value in fields.items()
            )
            found["decay"] = len(copy["decay"]) == len(saved["decay"])
            restored.load_state_dict(model.state_dict())
            train(restored, again, batches(hvd.rank()), 3)
            found["end"] = digest(restored)
            found["steps"] = again.compression_state_dict()["step"]
        results[name] = found
    report(hvd.rank(), results)
    hvd.barrier()


def refusals(file, optimizer, foreign):
    """What rank 0's torn file, and another method's, say on all ranks."""
    torn = OUT / "torn.ef"
    if hvd.rank() == 0:
        torn.write_bytes(file.read_bytes()[:-7])
    before = bits_of(optimizer)
    return {
        "torn": error_of(lambda: ef.load(torn, optimizer)),
        "foreign": error_of(lambda: ef.load(file, foreign)),
        "unchanged": bits_of(optimizer) == before,
    }


def bits_of(optimizer):
    return {name: value.tobytes() for name, value in memories(optimizer).items()}


main()
