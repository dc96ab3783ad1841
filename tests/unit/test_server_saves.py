"""A server's checkpoints that cannot be written or read: one sentence, not a traceback."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ef_horovod.errors import ConfigMismatchError, ServerError
from ef_horovod.server.checkpoint import load, save
from ef_horovod.server.plan import BucketSpec
from ef_horovod.server.rounds import ServedBucket
from ef_horovod.server.saves import Saves

MEMORIES = {"w/": np.zeros(0, np.float32), "w/error": np.ones(5, np.float32)}


def bucket_at(step: int) -> ServedBucket:
    bucket = ServedBucket(0, BucketSpec("w", 5, "EF21(OneBit())", 0), 2, 7)
    bucket.step = step
    return bucket


def test_a_disk_that_takes_nothing_ends_the_job_with_a_sentence(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.touch()
    said: list[str] = []
    saves = Saves(place, 0, 2, said.append)
    buckets = [bucket_at(3)]
    assert not saves.ask(0, 3, buckets, 7)
    with pytest.raises(ServerError, match=r"server 0 could not write step 3 to .*file .*make room"):
        saves.ask(1, 3, buckets, 7)
    saves.save_what_is_complete(buckets, 7)
    assert said[0].startswith("could not save step 3: server 0 could not write step 3 to ")


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "another archive"])
def test_a_damaged_checkpoint_is_named(damage: str, tmp_path: Path) -> None:
    file = save(tmp_path, 4, 0, 7, MEMORIES)
    assert load(tmp_path, 4, 7, ["w"])["w/error"].tolist() == [1] * 5
    if damage == "another archive":
        np.savez(file, x=np.zeros(3))
    else:
        whole = file.read_bytes()
        file.write_bytes({"cut": whole[:-30], "text": b"no archive", "empty": b""}[damage])
    with pytest.raises(ConfigMismatchError, match=r"the checkpoint .*server-0.npz cannot be read"):
        load(tmp_path, 4, 7, ["w"])
