"""Hypothesis draws the same examples in every run, so a failure is a failure of the change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings
from sampling import (  # noqa: F401 - hooks and a fixture
    every_case,
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
)

from ef_horovod.compressors.registry import COMPRESSORS
from ef_horovod.exchange.registry import EXCHANGES
from ef_horovod.methods.registry import METHODS

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


@pytest.fixture
def own_classes() -> Iterator[None]:
    """Compressors, methods and exchanges that the test registers are forgotten after it."""
    before: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (table, dict(table)) for table in (COMPRESSORS, METHODS, EXCHANGES)
    ]
    yield
    for table, entries in before:
        table.clear()
        table.update(entries)
