"""Error memories in TensorFlow's and Keras' checkpoints.

They belong to a rank, and a checkpoint is mostly rank 0's. So what fits is taken over, and what
does not (another rank's, another number of ranks, another method) is set aside: at the first step
all ranks compare, and if one of them has found a stranger's, all of them start from zero.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf


class Memories(tf.train.experimental.PythonState):
    """Tracked by `tf.train.Checkpoint`; one string with all of a rank's memories.

    Args:
        save: gives a state dict, as `state.save_state` does, of NumPy arrays.
        load: takes one over.
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


class MemoriesInKeras(keras.layers.Layer):
    """The same in `.keras` and `.weights.h5` files, where only layers and the like are saved.

    It is a group of its own in the file: a plain optimizer loads the rest without a warning.
    """

    def __init__(self, memories: Memories) -> None:
        super().__init__(name="compression_memories", trainable=False)
        self._memories = memories
        self.built = True

    def save_own_variables(self, store: Any) -> None:
        store["state"] = np.frombuffer(self._memories.serialize(), np.uint8)

    def load_own_variables(self, store: Any) -> None:
        if "state" in store.keys():  # noqa: SIM118 - an h5py group, not a dict
            self._memories.deserialize(np.asarray(store["state"]).tobytes())


def pack_state(state: dict[str, Any]) -> bytes:
    """A state dict as bytes: NumPy's npz, the facts as JSON inside; nothing is pickled."""
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
