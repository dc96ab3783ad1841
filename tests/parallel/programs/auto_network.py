"""`exchange="auto:NETWORK"` by both PyTorch adapters, beside what it should stand for."""

from __future__ import annotations

import warnings

import horovod.torch as hvd
import torch
from common import error_of, report
from torch_common import batches, build_model, digest, flat, train

import ef_horovod.torch as ef

SIGNS = ef.OneBit()
METHOD, DENSE = ef.DoubleSqueeze(SIGNS, server_compressor=SIGNS), ef.NoFeedback(ef.Identity())
WAYS = {  # exchange: (method and exchange that it should stand for)
    "auto": (METHOD, "gather"),
    "auto:64kbit": (METHOD, "double_pass"),
    "auto:400gbit,0us": (DENSE, "dense"),
}


def run(adapter, method, exchange):
    """Digest and norm after some steps, and how the buckets of matrices travelled."""
    model = build_model()
    named = list(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    if adapter == "ef":
        optimizer = ef.DistributedOptimizer(
            optimizer, named, compression=method, exchange=exchange, bucket_bytes=10_000
        )
        source = optimizer
    else:
        source = ef.Compression(method, named, exchange=exchange)
        optimizer = hvd.DistributedOptimizer(optimizer, named, compression=source)
    train(model, optimizer, batches(hvd.rank()), 5)
    ways = {row.exchange for row in source.stats() if row.num_elements > 1000 and row.exchange}
    return {"digest": digest(model), "norm": float(flat(model).norm()), "ways": sorted(ways)}


def main():
    hvd.init()
    found = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for adapter in ("ef", "stock"):
            for exchange, (method, kind) in WAYS.items():
                found[f"{adapter} {exchange}"] = {
                    "auto": run(adapter, METHOD, exchange),
                    "named": run(adapter, method, kind),
                }
    other = f"auto:{1 + hvd.rank()}gbit"
    report(
        hvd.rank(),
        {
            "found": found,
            "warned": sum("leaves gradients uncompressed" in str(w.message) for w in caught),
            "disagreement": error_of(lambda: run("ef", METHOD, other)),
        },
    )


main()
