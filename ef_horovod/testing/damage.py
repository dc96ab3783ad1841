"""Checks that decoding copes with truncated or changed bytes."""

from __future__ import annotations

import numpy as np

from ef_horovod.compressors.base import Compressor, Payload, mean_at_once
from ef_horovod.errors import PayloadError
from ef_horovod.testing.tools import KEY, require
from ef_horovod.wire import HEADER_NBYTES, Header


def check_damage(compressor: Compressor) -> None:
    """Damaged bytes are decoded or raise PayloadError; nothing is written outside the array."""
    rng = np.random.default_rng(5)
    for d in (0, 1, 9, 300):
        sent = bytes(compressor.compress(rng.normal(size=d).astype(np.float32), KEY))
        cuts = range(len(sent)) if len(sent) < 200 else rng.integers(len(sent), size=200)
        for length in cuts:
            error = _decode(compressor, sent[:length], d)
            require(error is not None, compressor, f"decodes {length} of {len(sent)} bytes")
        for length in (*cuts, len(sent) + 1, len(sent) + 8):
            if length >= HEADER_NBYTES:  # with a fitting header, so that the compressor must notice
                body = sent[HEADER_NBYTES:length].ljust(length - HEADER_NBYTES, b"\0")
                header = Header(type(compressor).wire_id, 0, len(body), d)
                error = length == len(sent) or _decode(compressor, bytes(header.pack()) + body, d)
                message = f"decodes {len(body)} bytes, expected {len(sent) - HEADER_NBYTES}"
                require(error, compressor, message)
        for _ in range(600):
            _decode(compressor, _damaged(sent, rng), d)


def _damaged(sent: bytes, rng: np.random.Generator) -> bytes:
    """A payload with up to three bytes changed."""
    damaged = bytearray(sent)
    first = 0 if rng.random() < 0.3 else HEADER_NBYTES  # mostly the compressor's body
    for _ in range(rng.integers(1, 4) if len(sent) > first else 0):
        # Counts and bounds come first, so most damage goes there.
        place = first + int((len(sent) - first) * rng.random() ** 3)
        damaged[place] = rng.integers(256)
    return bytes(damaged)


def _decode(compressor: Compressor, data: bytes, d: int) -> PayloadError | None:
    """Decode bytes into an array between two guards; returns the PayloadError, if any."""
    room = np.full(d + 4096, 7, np.float32)
    dense, taken = room[2048 : 2048 + d], False
    try:
        payload = Payload.from_bytes(data)
        if payload.num_elements != d or payload.kind is not type(compressor):
            return PayloadError("the receiver expects another length or another compressor")
        with np.errstate(all="ignore"):  # damaged numbers may overflow
            taken = mean_at_once([payload], 1, dense, None)
            dense[:] = 7
            payload.add_to(dense)
    except PayloadError as error:
        require(not taken, compressor, "has a mean that takes what add_to refuses")
        require(np.all(dense == 7), compressor, "writes before it refuses a damaged payload")
        return error
    except Exception as error:
        message = f"raises {error!r} for damaged bytes, expected PayloadError: {data.hex()}"
        raise AssertionError(f"{compressor!r} {message}") from error
    finally:
        outside = np.concatenate([room[:2048], room[2048 + d :]])
        require(np.all(outside == 7), compressor, "writes outside for damaged bytes")
    return None
