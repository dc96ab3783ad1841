"""By default a covering sample of large products of cases; with --all every one of them.

    @pytest.mark.exhaustive    # more of what other cases show: with --all only

    @pytest.mark.covering(factors=lambda method, step: (type(method), method.compressor, step))
    @pytest.mark.parametrize(...)

`factors` gives a case's factors from its parameters; without it they are the parameters. Each pair
of values of two factors that occurs together in some case occurs in the sample, too. The sample is
the same in every run; pytest counts the others as deselected.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="every case, not a covering sample")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "covering(factors): of its cases a sample runs that has all pairs of factors"
    )
    config.addinivalue_line("markers", "exhaustive: runs with --all only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _every_case(config):  # whoever names a test means it
        return
    products: dict[Any, list[Any]] = {}
    left_out = {item for item in items if item.get_closest_marker("exhaustive")}
    for item in items:
        if item.get_closest_marker("covering"):
            products.setdefault((item.path, item.originalname), []).append(item)
    for cases in products.values():
        left_out |= set(cases) - set(covering(cases, _factors))
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def every_case(pytestconfig: pytest.Config) -> bool:
    """Whether a job has to run every case: with --all, or if a test is named."""
    return _every_case(pytestconfig)


def _every_case(config: pytest.Config) -> bool:
    return config.getoption("--all") or any("::" in argument for argument in config.args)


def covering(
    cases: Sequence[Any], factors: Callable[[Any], tuple[Any, ...]], together: int = 2
) -> list[Any]:
    """Cases that have every pair of values of two factors, few of them, in their order.

    Args:
        cases: all there are.
        factors: a case's values; equally many for each.
        together: 1 for every value of a factor, instead of every pair.
    """
    found, chosen = set(), set()
    order = list(range(len(cases)))
    random.Random(0).shuffle(order)
    for place in order:
        pairs = set(combinations(enumerate(map(repr, factors(cases[place]))), together))
        if pairs - found:
            found |= pairs
            chosen.add(place)
    return [cases[place] for place in sorted(chosen)]


def _factors(item: Any) -> tuple[Any, ...]:
    function = item.get_closest_marker("covering").kwargs.get("factors")
    parameters = item.callspec.params
    if function is None:
        return tuple(parameters.values())
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return tuple(function(*(parameters[name] for name in names)))
