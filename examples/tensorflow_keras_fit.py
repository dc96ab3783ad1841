"""`model.fit` on handwritten digits, with a hundredth of the bytes.

    horovodrun -np 2 python examples/tensorflow_keras_fit.py

Against a script for one process, the lines marked NEW have changed. With tf_keras in place of keras
it is the same. `jit_compile=False` matters where there is a GPU: Keras would compile the step with
XLA there, which has no kernels for Horovod's gather.
"""

import horovod.tensorflow as hvd  # NEW
import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits  # pip install scikit-learn

import ef_horovod.tensorflow as ef  # NEW

hvd.init()  # NEW
gpus = tf.config.list_physical_devices("GPU")
if gpus:  # NEW: each rank takes a GPU of its own
    tf.config.set_visible_devices(gpus[hvd.local_rank()], "GPU")
keras.utils.set_random_seed(0)

digits = load_digits()
x, y = (digits.data / 16).astype(np.float32), digits.target
train = np.arange(hvd.rank(), 1200, hvd.size())  # NEW: this rank's images, equally many on all
test = np.arange(1200, len(y))

model = keras.Sequential(
    [keras.Input((64,)), keras.layers.Dense(256, activation="relu"), keras.layers.Dense(10)]
)
optimizer = keras.optimizers.SGD(0.03, momentum=0.9)
optimizer = ef.DistributedOptimizer(optimizer, compression=ef.ErrorFeedback(ef.TopK(0.01)))  # NEW
model.compile(
    optimizer,
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
    jit_compile=False,  # NEW
)
model.fit(
    x[train],
    y[train],
    batch_size=20,
    epochs=15,
    callbacks=[ef.TrainingCallback()],  # NEW: equal start, metrics of all ranks
    verbose=2 if hvd.rank() == 0 else 0,  # NEW
)

if hvd.rank() == 0:
    _, accuracy = model.evaluate(x[test], y[test], verbose=0)
    total = optimizer.stats()[-1]
    print(f"accuracy {accuracy:.3f}, sent {total.bytes_out} bytes, dense {total.dense_bytes_out}")
