"""Error-feedback state in TensorFlow's and Keras' checkpoints.

The state belongs to a rank, and a checkpoint usually comes from rank 0. State that fits is loaded.
State of another rank, number of ranks or method is ignored. At the first step all ranks compare
this. If the state did not fit one rank, all ranks start from zero.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf


class TrackedState(tf.train.experimental.PythonState):
    """All error-feedback state of a rank as one string, tracked by `tf.train.Checkpoint`.

    Args:
        save: returns a state dict of NumPy arrays, as `save_state` does.
        load: loads such a state dict.
    """

    def __init__(
        self, save: Callable[[], dict[str, Any]], load: Callable[[dict[str, Any]], None]
    ) -> None:
        super().__init__()
        self._save, self._load = save, load

    def serialize(self) -> bytes:
        """For TensorFlow: the state as bytes."""
        return pack_state(self._save())

    def deserialize(self, string_value: bytes) -> None:
        """For TensorFlow: the reverse of `serialize`."""
        self._load(unpack_state(string_value))


class StateInKeras(keras.layers.Layer):
    """The same in `.keras` and `.weights.h5` files, which save only layers and similar objects.

    It is a separate group in the file, so a plain optimizer loads the rest without a warning.
    """

    def __init__(self, tracked: TrackedState) -> None:
        super().__init__(name="compression_state", trainable=False)
        self._tracked = tracked
        self.built = True

    def save_own_variables(self, store: Any) -> None:
        store["state"] = np.frombuffer(self._tracked.serialize(), np.uint8)

    def load_own_variables(self, store: Any) -> None:
        if "state" in store.keys():  # noqa: SIM118 - an h5py group, not a dict
            self._tracked.deserialize(np.asarray(store["state"]).tobytes())


def pack_state(state: dict[str, Any]) -> bytes:
    """A state dict as bytes: NumPy's npz with the facts as JSON; no pickle."""
    parameters = state["parameters"]
    arrays: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for name, fields in parameters.items():
        for field, value in fields.items():
            (arrays if hasattr(value, "shape") else plain)[f"{name}|{field}"] = value
    facts = {key: value for key, value in state.items() if key != "parameters"}
    text = json.dumps({"facts": facts, "plain": plain})
    buffer = io.BytesIO()
    arrays[_TEXT] = np.frombuffer(text.encode(), np.uint8)
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def unpack_state(data: bytes) -> dict[str, Any]:
    """The reverse of `pack_state`.

    Raises:
        ValueError: the bytes are something else.
    """
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        content = json.loads(archive[_TEXT].tobytes())
        entries = content["plain"] | {key: archive[key] for key in archive.files if key != _TEXT}
    parameters: dict[str, dict[str, Any]] = {}
    for key, value in entries.items():
        name, _, field = key.rpartition("|")
        parameters.setdefault(name, {})[field] = value
    return {**content["facts"], "parameters": parameters}


_TEXT = "|facts"
