"""The bytes of messages, and that nothing else passes for one."""

from __future__ import annotations

import numpy as np
import pytest

from ef_horovod.errors import ConfigMismatchError, PayloadError, ProtocolError
from ef_horovod.methods.parsing import read_method
from ef_horovod.server.plan import BucketSpec, Config, assign, require_agreement
from ef_horovod.server.protocol import HEADER_NBYTES, Kind, Message, pack, unpack

MESSAGE = Message(Kind.PUSH, 1, 2, 3, 4, 0x1122334455667788)
BODY = np.arange(100, dtype=np.uint8)


def test_golden_bytes():
    """What is on the wire stays as it is, or VERSION changes."""
    assert pack(MESSAGE, BODY[:5]).tobytes().hex() == (
        "45465053" "02" "03" "0000" "01000000" "02000000" "03000000" "04000000" "05000000"
        "be0fca84" "8877665544332211" "0001020304"
    )  # fmt: skip


def test_there_and_back():
    message, body = unpack(pack(MESSAGE, BODY))
    assert message == MESSAGE
    np.testing.assert_array_equal(body, BODY)
    room = np.full(500, 9, np.uint8)
    assert pack(MESSAGE, BODY, room).base is room
    assert np.all(room[HEADER_NBYTES + BODY.size :] == 9)


def test_every_changed_byte_of_a_body_shows():
    sent = pack(MESSAGE, BODY)
    for place in range(HEADER_NBYTES, sent.size):
        for bit in range(8):
            damaged = sent.copy()
            damaged[place] ^= 1 << bit
            with pytest.raises(ProtocolError, match="checksum"):
                unpack(damaged)


def test_another_version_is_refused_by_its_number():
    sent = pack(MESSAGE, BODY)
    sent[4] = 1
    with pytest.raises(ProtocolError, match=r"version 1 and .*, 2 and .*install the same ef_horov"):
        unpack(sent)


@pytest.mark.parametrize("length", [0, 1, 39, 40, 60, 139])
def test_what_is_cut_off_is_refused(length):
    with pytest.raises(ProtocolError):
        unpack(pack(MESSAGE, BODY)[:length])


def test_random_bytes_are_refused():
    rng = np.random.default_rng(1)
    for _ in range(500):
        data = rng.integers(0, 256, rng.integers(200)).astype(np.uint8)
        with pytest.raises(ProtocolError):
            unpack(data)


SPECS = (BucketSpec("a", 10, "EF21(OneBit())", 0), BucketSpec("b", 20, "NoFeedback(Identity())", 0))
CONFIG = Config(SPECS, ("parameter 'w' of shape (2, 5)",))


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (Config(SPECS[:1], CONFIG.facts), "worker 0 has 2 buckets .* and worker 1 has 1 buckets"),
        (Config(SPECS, ("parameter 'v'",)), r"shape \(2, 5\) and worker 1 has parameter 'v'"),
        (Config(SPECS, ()), r"shape \(2, 5\) and worker 1 has nothing there"),
        (CONFIG._replace(step=3), "next step 0 and worker 1 has 2 buckets and the next step 3"),
        (
            Config((SPECS[0]._replace(seed=1), SPECS[1]), CONFIG.facts),
            "with seed 0 and worker 1 has bucket 'a' .* with seed 1",
        ),
    ],
)
def test_workers_that_disagree_are_refused(other, problem):
    with pytest.raises(ConfigMismatchError, match=problem):
        require_agreement([CONFIG, other], None)


def test_a_server_with_another_method_refuses():
    with pytest.raises(
        ConfigMismatchError, match=r"server has EF21\(TopK\(k=1\)\) and the workers"
    ):
        require_agreement([CONFIG, CONFIG], read_method("EF21(TopK(k=1))"))
    require_agreement([CONFIG, CONFIG], read_method("EF21(OneBit())"))
    require_agreement([CONFIG], None)


def test_configs_travel_as_json():
    assert Config.from_json(CONFIG.to_json()) == CONFIG
    assert Config.from_json(CONFIG.to_json()).fingerprint == CONFIG.fingerprint
    for text in ("", "[]", '{"buckets": [[1]]}', "\x00"):
        with pytest.raises(PayloadError, match="first message is no config"):
            Config.from_json(text)


def test_the_fingerprint_is_of_all_but_the_step():
    assert CONFIG._replace(step=9).fingerprint == CONFIG.fingerprint
    assert CONFIG._replace(facts=()).fingerprint != CONFIG.fingerprint


@pytest.mark.parametrize("servers", [1, 2, 3, 5])
def test_buckets_are_balanced_by_bytes(servers):
    rng = np.random.default_rng(2)
    specs = [BucketSpec(str(i), int(n), "EF21(OneBit())", 0) for i, n in
             enumerate(rng.integers(1000, 100_000, 40))]  # fmt: skip
    owners = assign(specs, servers)
    loads = [sum(s.length for s, o in zip(specs, owners, strict=True) if o == k)
             for k in range(servers)]  # fmt: skip
    assert set(owners) == set(range(servers))
    assert max(loads) <= 1.1 * sum(loads) / servers
    assert owners == assign(specs, servers)


def test_a_method_that_the_server_does_not_know_is_named_with_the_way_out():
    unknown = Config((BucketSpec("w", 5, "ErrorFeedback(Ours(ratio=0.1))", 0),))
    with pytest.raises(ConfigMismatchError, match=r"workers have ErrorFeedback\(Ours.*--import"):
        require_agreement([unknown, unknown], None)
