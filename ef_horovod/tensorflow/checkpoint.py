"""Error-feedback state in TensorFlow's and Keras' checkpoints.

The state belongs to a rank, and a checkpoint usually comes from rank 0. State that fits is loaded.
State of another rank, number of ranks or method is ignored. At the first step all ranks compare
this. If the state did not fit one rank, all ranks start from zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from ef_horovod.training.state_file import pack, unpack


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
        return pack(self._save())

    def deserialize(self, string_value: bytes) -> None:
        """For TensorFlow: the reverse of `serialize`."""
        self._load(unpack(string_value, "a checkpoint's compression state"))


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
