"""Error-feedback state for any number of ranks: what is kept, and what the file refuses."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest

import ef_horovod as ef
from ef_horovod.errors import StateFileError
from ef_horovod.methods.error_feedback import ErrorFeedback
from ef_horovod.testing.checkpoints import merged_state
from ef_horovod.testing.frameworks import OneChannel
from ef_horovod.testing.workers import D, channels, gradients, run_channels
from ef_horovod.training.buckets import Slot
from ef_horovod.training.choice import open_channel
from ef_horovod.training.merging import merge, split
from ef_horovod.training.saving import load, save
from ef_horovod.training.state_file import pack, unpack
from ef_horovod.transports.local import local_group

TOP = ef.TopK(ratio=0.05)
SLOTS = [Slot("a", None, 0, 200), Slot("b", None, 200, D)]


def memory_of(method, merged):
    """What the merged state holds back of the sum of all gradients."""
    key = "worker.accumulation" if isinstance(method, ef.MomentumCorrection) else "worker.error"
    keys = [key] + ["server.error"] * isinstance(method, ef.DoubleSqueeze)
    return sum(np.concatenate([merged[n][key] for n in "ab"]).astype(np.float64) for key in keys)


@pytest.mark.parametrize(
    "method",
    [
        ErrorFeedback(TOP),
        ErrorFeedback(ef.OneBit()),
        ef.DoubleSqueeze(TOP, server_compressor=TOP),
        ef.MomentumCorrection(TOP, momentum=0.0),
        ef.PerturbedCompressedSGD(TOP),
    ],
    ids=repr,
)
def test_what_was_sent_and_the_memory_are_all_gradients_on_4_then_3_then_6_ranks(method):
    given, sent, merged, step = np.zeros(D), np.zeros(D), None, 0
    for ranks, exchange in ((4, "gather"), (3, "double_pass"), (6, "gather")):
        group = channels(method, ranks, exchange=exchange)
        for channel in group if merged else ():
            split([OneChannel(channel, SLOTS)], merged)
        for g in gradients(ranks, 6, seed=ranks):
            given += g.astype(np.float64).mean(0)
            sent += run_channels(group, g, step)[0]
            step += 1
        merged = merged_state(group, SLOTS)
        held = memory_of(method, merged)
        assert np.abs(held).max() > 1
        np.testing.assert_allclose(sent + held, given, atol=3e-5 * np.abs(given).max())


def test_ef21_goes_on_from_the_mean_of_all_tracked_gradients():
    method = ef.EF21(TOP, momentum=0.3)
    group = channels(method, 4)
    for t, g in enumerate(gradients(4, 6)):
        direction = run_channels(group, g, t)[0]
    merged = merged_state(group, SLOTS)
    tracked = np.concatenate([merged[name]["worker.tracked"] for name in "ab"])
    np.testing.assert_allclose(tracked, direction, rtol=1e-5, atol=1e-6)
    more = channels(method, 6)
    for channel in more:
        split([OneChannel(channel, SLOTS)], merged)
    for channel in more:  # all ranks share H, bit by bit
        assert channel.worker.tracked.tobytes() == tracked.tobytes()
        assert channel.worker.started is True
        np.testing.assert_allclose(channel.server.total / 6, tracked, rtol=1e-6)


def test_a_worker_that_has_not_started_lets_all_momenta_start_again():
    method = ef.EF21(TOP, momentum=0.3, participation=0.5)
    group = channels(method, 4)
    run_channels(group, gradients(4, 1)[0], 0)  # two of four take part
    merged = merged_state(group, SLOTS)
    assert merged["a"]["worker.started"] == 0.5
    split([OneChannel(group[0], SLOTS)], merged)
    assert group[0].worker.started is False


NODES = [0, 0, 1, 1], [0, 0, 0, 1]


@pytest.mark.parametrize("nodes", NODES, ids=str)
@pytest.mark.parametrize("inner", ["gather", "double_pass"])
def test_nodes_of_several_ranks_count_as_one_worker_each(nodes, inner):
    method = ef.DoubleSqueeze(TOP, server_compressor=TOP)
    exchange, zeros = f"hierarchical:{inner}", np.zeros(D, np.float32)
    group = [
        open_channel("weights", zeros, method, end, exchange=exchange, seed=1)
        for end in local_group(4, 5, nodes=nodes)
    ]
    before = channels(method, 3)
    for t, g in enumerate(gradients(3, 5)):
        run_channels(before, g, t)
    merged = merged_state(before, SLOTS)
    for channel in group:
        split([OneChannel(channel, SLOTS)], merged)
    again = merged_state(group, SLOTS)
    for name, fields in merged.items():
        for key, value in fields.items():
            assert again[name][key].tobytes() == value.tobytes()


def test_other_buckets_take_the_same_state():
    method = ErrorFeedback(TOP)
    group = channels(method, 2)
    for t, g in enumerate(gradients(2, 3)):
        run_channels(group, g, t)
    merged = merged_state(group, SLOTS)
    (alone,) = channels(method, 1)
    reordered = [Slot("b", None, 0, D - 200), Slot("a", None, D - 200, D)]
    split([OneChannel(alone, reordered)], merged)
    found = alone.worker.error
    assert found[: D - 200].tobytes() == merged["b"]["worker.error"].tobytes()
    assert found[D - 200 :].tobytes() == merged["a"]["worker.error"].tobytes()


def test_a_method_that_does_not_say_how_its_state_merges_is_refused_by_name():
    class Silent(ErrorFeedback):
        merging = None

    class Forgetful(ErrorFeedback):
        merging: ClassVar = {}

    for method, problem in (
        (Silent(TOP), r"got Silent.*expected a method with `merging`; save"),
        (Forgetful(TOP), r"got Forgetful.*'worker.error' in `merging`, expected"),
        (ef.EF21(TOP, weights=(1.0, 2.0)), r"expected one without weights"),
    ):
        with pytest.raises(ef.UnsupportedError, match=problem):
            merged_state(channels(method, 2), SLOTS)


def test_the_state_of_another_model_is_refused_and_changes_nothing():
    method = ErrorFeedback(TOP)
    (channel,) = channels(method, 1)
    run_channels([channel], gradients(1, 1)[0], 0)
    before = channel.worker.error.copy()
    merged = merged_state([channel], SLOTS)
    merged["b"]["worker.error"] = merged["b"]["worker.error"][1:] + 1
    with pytest.raises(ValueError, match=r"'b' has .*299.*expected .*300.*; load it into the same"):
        split([OneChannel(channel, SLOTS)], merged)
    assert channel.worker.error.tobytes() == before.tobytes()


class Optimizer:
    """An optimizer of one rank, whose state is a given dict."""

    drivers = ()

    def __init__(self, state=None):
        self.state = state or {}

    def merged_state_dict(self):
        return self.state


STATE = {
    "merged": True, "step": 7, "size": 4, "methods": {"a": "EF21"},
    "parameters": {"array": {"worker.error": np.arange(5, dtype=np.float32)}, "dict": {"n": 0.5}},
}  # fmt: skip


def test_a_file_gives_back_what_was_saved(tmp_path):
    file = tmp_path / "state.ef"
    save(file, Optimizer(STATE))
    found = unpack(file.read_bytes(), "it")
    error = found["parameters"]["array"].pop("worker.error")
    assert (error.dtype, error.tolist()) == (np.float32, [0, 1, 2, 3, 4])
    found["parameters"]["array"]["worker.error"] = STATE["parameters"]["array"]["worker.error"]
    assert found == STATE
    with pytest.warns(UserWarning, match="of a job of 4 ranks for one of 1, expected several"):
        load(file, Optimizer())
    assert [each.name for each in tmp_path.iterdir()] == ["state.ef"]


def test_every_damaged_byte_and_every_torn_file_is_named_or_harmless():
    data = pack(STATE)
    refused = 0
    for place in range(len(data)):
        flipped = data[:place] + bytes([data[place] ^ 0x41]) + data[place + 1 :]
        for broken in (data[:place], flipped):
            found = unpacked_or_error(broken)
            if isinstance(found, str):
                refused += 1
                assert found.startswith("got state.ef, which is damaged")
            else:  # a byte that means nothing, such as one of a date
                array = found["parameters"]["array"]["worker.error"]
                assert (array.tolist(), found["step"]) == ([0, 1, 2, 3, 4], 7)
    assert refused > 1.5 * len(data)


def unpacked_or_error(data):
    try:
        return unpack(data, "state.ef")
    except StateFileError as error:
        return str(error)


def test_foreign_and_missing_files_are_named(tmp_path):
    file = tmp_path / "state.ef"
    for data, problem in (
        (b"", "which is damaged or another kind of file"),
        (b"PK" + bytes(500), "which is damaged or another kind of file"),
        (np.random.default_rng(0).bytes(5000), "which is damaged or another kind of file"),
    ):
        file.write_bytes(data)
        with pytest.raises(StateFileError, match=problem) as caught:
            load(file, Optimizer())
        assert str(file) in str(caught.value)
    with pytest.raises(StateFileError, match="could not read .*missing.ef"):
        load(tmp_path / "missing.ef", Optimizer())


def test_a_newer_version_is_named(monkeypatch):
    monkeypatch.setattr("ef_horovod.training.state_file._VERSION", 2)
    newer = pack(STATE)
    monkeypatch.undo()
    with pytest.raises(StateFileError, match=r"state.ef of version 2, expected version 1; read it"):
        unpack(newer, "state.ef")


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    file = tmp_path / "state.ef"
    save(file, Optimizer(STATE))
    before = file.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StateFileError, match=r"could not write .*state.ef .*No space.*; make room"):
        save(file, Optimizer(STATE | {"step": 8}))
    assert file.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["state.ef"]


def test_only_what_has_such_state_is_saved(tmp_path):
    with pytest.raises(ef.UnsupportedError, match="got a list, expected a wrapped optimizer"):
        save(tmp_path / "x", [])


def test_state_that_servers_keep_is_refused():
    class Served:
        has_server = True

    with pytest.raises(ef.UnsupportedError, match=r"exchange='server'.*save by checkpoint\(\)"):
        merge([], Served())
