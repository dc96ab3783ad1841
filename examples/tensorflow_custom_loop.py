"""A training loop of your own inside `tf.function`, with checkpoints that resume exactly.

    horovodrun -np 2 python examples/tensorflow_custom_loop.py CHECKPOINTS

The reducer holds what this rank has not sent yet, so each rank saves a checkpoint of its own. Call
it again with the same folder and it goes on from there; without a folder it saves nothing.
"""

import sys

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits  # pip install scikit-learn

import ef_horovod.tensorflow as ef

EPOCHS, BATCH = 15, 20

hvd.init()
gpus = tf.config.list_physical_devices("GPU")
if gpus:
    tf.config.set_visible_devices(gpus[hvd.local_rank()], "GPU")
keras.utils.set_random_seed(0)

digits = load_digits()
x, y = tf.constant(digits.data / 16, tf.float32), tf.constant(digits.target)
train = np.arange(hvd.rank(), 1200, hvd.size())  # this rank's images
test = np.arange(1200, len(y))

model = keras.Sequential(
    [keras.Input((64,)), keras.layers.Dense(256, activation="relu"), keras.layers.Dense(10)]
)
variables = model.trainable_variables
optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
optimizer.build(variables)
reducer = ef.Reducer(variables, ef.EF21(ef.TopK(ratio=0.01), momentum=0.3))
epochs_done = tf.Variable(0, trainable=False)


@tf.function
def train_step(batch: tf.Tensor) -> None:
    with tf.GradientTape() as tape:
        logits = model(tf.gather(x, batch), training=True)
        loss = tf.reduce_mean(
            tf.nn.sparse_softmax_cross_entropy_with_logits(tf.gather(y, batch), logits)
        )
    tape = ef.DistributedGradientTape(tape, compression=reducer)
    gradients = tape.gradient(loss, variables)
    gradients, _ = tf.clip_by_global_norm(gradients, 1.0)  # of the averages, alike on all ranks
    optimizer.apply_gradients(zip(gradients, variables, strict=True))


checkpoint = tf.train.Checkpoint(
    model=model, optimizer=optimizer, reducer=reducer, epochs_done=epochs_done
)
manager = None
if sys.argv[1:]:
    manager = tf.train.CheckpointManager(checkpoint, f"{sys.argv[1]}/rank{hvd.rank()}", 1)
    checkpoint.restore(manager.latest_checkpoint)
ef.require_in_sync([epochs_done])  # or else some rank has not found its checkpoint
ef.broadcast_variables(model.variables + optimizer.variables)

for epoch in range(int(epochs_done), EPOCHS):
    order = np.random.default_rng((epoch, hvd.rank())).permutation(train)
    for batch in order.reshape(-1, BATCH):
        train_step(tf.constant(batch))
    epochs_done.assign_add(1)
    if manager:
        manager.save()

if hvd.rank() == 0:
    predicted = np.argmax(model(tf.gather(x, test)), axis=1)
    accuracy, total = np.mean(predicted == digits.target[test]), reducer.stats()[-1]
    print(f"accuracy {accuracy:.3f}, sent {total.bytes_out} bytes, dense {total.dense_bytes_out}")
