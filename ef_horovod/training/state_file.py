"""State dicts as bytes: NumPy's npz, with the rest as JSON. No pickle: reading runs no code.

    content    JSON: the dict; each array is replaced by {"array": its number}
    0, 1, ...  the arrays

Each part has a checksum of 32 bits (zip's), which reading compares.
"""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any

import numpy as np

from ef_horovod.errors import StateFileError

_FORMAT, _VERSION = "ef_horovod state", 1
_CONTENT, _KINDS = "content", "fiub"
_MARK = "array"


def pack(state: dict[str, Any]) -> bytes:
    """A dict with text keys as bytes; arrays must be NumPy's, the rest what JSON can write."""
    arrays: list[np.ndarray] = []

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {"dict": {name: plain(part) for name, part in value.items()}}
        if isinstance(value, np.ndarray) and value.dtype.kind in _KINDS:
            arrays.append(value)
            return {_MARK: len(arrays) - 1}
        return value

    text = json.dumps({"format": _FORMAT, "version": _VERSION, "state": plain(state)})
    buffer = io.BytesIO()
    content = {_CONTENT: np.frombuffer(text.encode(), np.uint8)}
    np.savez(buffer, allow_pickle=False, **content, **{str(i): a for i, a in enumerate(arrays)})
    return buffer.getvalue()


def unpack(data: bytes, where: str) -> dict[str, Any]:
    """The reverse of `pack`.

    Args:
        data: any bytes.
        where: the name of their file, for messages.

    Raises:
        StateFileError: the bytes are damaged, something else, or of a newer version.
    """
    try:
        content, arrays = _parts(data)
        kind, version = content["format"], content["version"]
        if kind != _FORMAT or not isinstance(version, int):
            raise ValueError(f"format {kind!r}")
        state = _filled(content["state"], arrays) if version == _VERSION else {}
        if not isinstance(state, dict):
            raise TypeError(f"a {type(state).__name__}")
    except Exception as error:  # whatever damaged bytes lead to
        reason = f"{type(error).__name__}: {error}"[:200]
        raise StateFileError(
            f"got {where}, which is damaged or another kind of file ({reason}), expected one "
            "written by ef.save; copy it again, take an earlier one, or start without it"
        ) from error
    if version != _VERSION:
        raise StateFileError(
            f"got {where} of version {version}, expected version {_VERSION}; read it with the "
            "release of ef_horovod that wrote it, or a later one, or start without it"
        )
    return state


def _parts(data: bytes) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The JSON and the arrays; no part takes more memory than the data."""
    parts = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > len(data):
                raise ValueError(f"a part of {info.file_size} bytes")
            array = np.load(io.BytesIO(archive.read(info)), allow_pickle=False)
            parts[info.filename.removesuffix(".npy")] = array
    content = json.loads(parts.pop(_CONTENT).tobytes())
    return content, [parts[str(i)] for i in range(len(parts))]


def _filled(value: Any, arrays: list[np.ndarray]) -> Any:
    """What JSON has kept, with its arrays."""
    if not isinstance(value, dict):
        return value
    if "dict" in value:
        return {name: _filled(part, arrays) for name, part in value["dict"].items()}
    return arrays[value[_MARK]]
