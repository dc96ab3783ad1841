"""The comparison of configs: the first difference is named, however long the descriptions are."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from ef_horovod.errors import ConfigMismatchError
from ef_horovod.exchange.config_check import require_same_config
from ef_horovod.transports.local import local_group

COMMON = [f"parameter 'model.layers.{i}.weight' of shape (768, 768)" for i in range(4000)]


def compare(*facts: list[str]) -> tuple[list[str], list[int]]:
    """The errors of ranks with these facts, and the bytes that each of them sent."""
    group = local_group(len(facts), timeout=30)

    def error(rank: int) -> str:
        try:
            require_same_config(group[rank], facts[rank])
        except ConfigMismatchError as mismatch:
            return str(mismatch)
        return ""

    with ThreadPoolExecutor(len(facts)) as pool:
        return list(pool.map(error, range(len(facts)))), [e.bytes_sent for e in group]


def test_equal_facts_cost_a_digest() -> None:
    errors, sent = compare(COMMON, COMMON, list(COMMON))
    assert errors == ["", "", ""]
    assert sent == [64, 64, 64]


@pytest.mark.parametrize("place", [0, 1, 2500, 3999, 4000])
def test_a_difference_is_named_wherever_it_is(place: int) -> None:
    other = [*COMMON[:place], "parameter 'x' of shape (é,)", *COMMON[place + 1 :]]
    errors, sent = compare(COMMON, COMMON, other)
    mine = COMMON[place] if place < len(COMMON) else "nothing there"
    sentence = f"rank 0 has {mine} and rank 2 has parameter 'x' of shape (é,), expected the same"
    assert [error.startswith(sentence) for error in errors] == [True] * 3
    assert max(sent) < 2000, "it does not grow with the model"


def test_what_one_rank_lacks_is_named() -> None:
    for first, second in ((COMMON, COMMON[:3000]), (COMMON[:3000], COMMON), ([], COMMON[3000:])):
        errors, _ = compare(first, second)
        extra = f"{COMMON[3000]}"
        here, there = (extra, "nothing there")[:: 1 if first is COMMON else -1]
        assert errors[0].startswith(f"rank 0 has {here} and rank 1 has {there}, expected")
        assert errors[1] == errors[0]


def test_a_long_fact_is_not_cut() -> None:
    ends = ["x" * 100_000 + end for end in "ab"]
    errors, _ = compare(*([fact] for fact in ends))
    assert errors[0].startswith(f"rank 0 has {ends[0]} and rank 1 has {ends[1]}, expected the same")
