"""Hostile bytes: changed and made-up data for everything that reads bytes or text.

    python benchmarks/fuzz.py                       a minute
    python benchmarks/fuzz.py --seconds 3600 --seed 7

Four readers get valid data with changes: payloads of every compressor, messages of the server's
protocol, files of `ef.save`, and methods as text. Each may read what it gets, or raise its own
error (`PayloadError`, `ProtocolError`, `StateFileError`, `ValueError` or `UnsupportedError`).
Anything else is a fault: another exception, or a write outside of the array. The first fault ends
the run with status 1 and prints the seed and the data.

Changes are flipped bits, other bytes, numbers at the limits of their types, cuts, insertions, and
parts of another valid input. There is no guidance by coverage.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import warnings
from collections.abc import Callable, Iterator

import numpy as np

from ef_horovod.compressors.registry import COMPRESSORS
from ef_horovod.errors import PayloadError, ProtocolError, StateFileError, UnsupportedError
from ef_horovod.methods.parsing import read_method
from ef_horovod.server import protocol
from ef_horovod.testing.damage import _decode
from ef_horovod.testing.tools import KEY
from ef_horovod.training.state_file import pack, unpack

_EACH = 50  # inputs for a reader in a round
Reader = Callable[[bytes], object]
_LIMITS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)
_TEXTS = (
    "EF21(TopK(ratio=0.01), momentum=0.1)", "topk:0.01", "DoubleSqueeze(OneBit(scale='l2'))",
    "ErrorFeedback(Then(TopK(k=3), QSGD(4)))", "TopK(Exponential(0.25, 0.001, 2000))", "ef21",
)  # fmt: skip


def payloads() -> Iterator[tuple[str, list[bytes], Reader]]:
    """Valid payloads of each compressor's examples, and what decodes them."""
    rng = np.random.default_rng(0)
    for kind in COMPRESSORS.values():
        for compressor in kind.examples():
            for d in (1, 9, 300):
                vectors = rng.normal(size=(3, d)).astype(np.float32)
                valid = [bytes(compressor.compress(x, KEY)) for x in vectors]

                def read(data: bytes, compressor=compressor, d=d) -> object:  # type: ignore[no-untyped-def]
                    return _decode(compressor, data, d)  # AssertionError is a fault

                yield "payloads", valid, read


def readers() -> Iterator[tuple[str, list[bytes], Reader]]:
    """The name of each kind, valid inputs, and what reads them."""
    yield from payloads()
    body = np.arange(40, dtype=np.uint8)
    numbers = range(1, len(protocol.Message._fields))
    kinds = [protocol.Message(kind, *numbers) for kind in protocol.Kind]
    yield "messages", [protocol.pack(m, body).tobytes() for m in kinds], _read_message
    state = {"merged": True, "step": 3, "parameters": {"a": {"worker.error": np.ones(9, "<f4")}}}
    yield "state files", [pack(state), pack({})], lambda data: unpack(data, "file")
    yield "texts", [text.encode() for text in _TEXTS], _read_text


def _read_message(data: bytes) -> object:
    return protocol.unpack(np.frombuffer(data, np.uint8))


def _read_text(data: bytes) -> object:
    return read_method(data.decode("latin-1"))


def changed(valid: list[bytes], rng: np.random.Generator) -> bytes:
    """A valid input with one to four changes."""
    data = bytearray(valid[rng.integers(len(valid))])
    for _ in range(rng.integers(1, 5)):
        at = int((len(data) + 1) * rng.random() ** 2)  # counts and bounds come first
        match rng.integers(6):
            case 0 if at < len(data):
                data[at] ^= 1 << int(rng.integers(8))
            case 1 if at < len(data):
                data[at] = rng.integers(256)
            case 2:
                size = int(rng.choice([1, 2, 4, 8]))
                number = _LIMITS[rng.integers(len(_LIMITS))] % 256**size
                data[at : at + size] = number.to_bytes(size, "little")
            case 3:
                del data[at : at + int(rng.integers(1, 9))]
            case 4:
                data[at:at] = rng.bytes(int(rng.integers(1, 9)))
            case 5:
                other = valid[rng.integers(len(valid))]
                data[at : at + 16] = other[at : at + 16]
    return bytes(data)


def tried(seconds: float, seed: int, most: int | None = None) -> dict[str, int]:
    """Numbers of inputs by kind, after this time or so many of each reader.

    Raises:
        AssertionError: a reader did something else than read or refuse; with the input.
    """
    rng, counts = np.random.default_rng(seed), dict[str, int]()
    refusals = PayloadError, ProtocolError, StateFileError, UnsupportedError, ValueError
    every, end = list(readers()), time.monotonic() + seconds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's, about texts
        for done in itertools.count():
            if time.monotonic() > end or (most is not None and done * _EACH >= most):
                return counts
            for kind, valid, read in every:
                times = _EACH if kind == "payloads" else 20 * _EACH  # one of very many, or alone
                for _ in range(times):
                    data = changed(valid, rng)
                    try:
                        read(data)
                    except refusals:
                        pass
                    except Exception as error:
                        what = f"seed {seed}, {kind}: {error!r} for {data.hex()}"
                        raise AssertionError(what) from error
                counts[kind] = counts.get(kind, 0) + times


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else int(time.time())
    print(f"seed {seed}", flush=True)
    for kind, count in tried(arguments.seconds, seed).items():
        print(f"{count:>12,} {kind}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
