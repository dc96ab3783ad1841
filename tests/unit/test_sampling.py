"""The default sample of a product has every pair of values, and few cases."""

from __future__ import annotations

from itertools import combinations, product

from sampling import covering

CASES = [
    case for case in product(range(8), "abcdefg", (1.5, 2.5, 3.5)) if case[0] != 3 or case[2] > 2
]


def pairs(cases):
    return {pair for case in cases for pair in combinations(enumerate(case), 2)}


def test_every_pair_of_values_occurs_in_few_cases():
    sample = covering(CASES, lambda case: case)
    assert pairs(sample) == pairs(CASES)
    assert len(sample) < len(CASES) / 2
    assert sample == covering(CASES, lambda case: case), "the same in every run"
    assert sample == sorted(sample)


def test_every_value_occurs_in_still_fewer():
    sample = covering(CASES, lambda case: case, together=1)
    for values, of_all in zip(zip(*sample, strict=True), zip(*CASES, strict=True), strict=True):
        assert set(values) == set(of_all)
    assert len(sample) < len(covering(CASES, lambda case: case))


def test_factors_may_be_coarser_than_cases():
    sample = covering(CASES, lambda case: (case[0] % 2, case[2]))
    assert {(a % 2, c) for a, _, c in sample} == {(a % 2, c) for a, _, c in CASES}
    assert len(sample) == 6
