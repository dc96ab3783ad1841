"""These tests need the nodes that docker/test starts; a plain pytest does not collect them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

PROJECT = os.environ.get("EF_DOCKER_PROJECT", "")
collect_ignore_glob = [] if PROJECT else ["test_*.py"]

if PROJECT:
    from nodes import Nodes

    @pytest.fixture(scope="session")
    def all_nodes() -> Nodes:
        """The nodes that docker/test has started, once they answer."""
        nodes = Nodes(PROJECT)
        nodes.wait_until_all_answer()
        return nodes

    @pytest.fixture
    def nodes(all_nodes: Nodes) -> Iterator[Nodes]:
        """The same, all running and idle: before each test and after it."""
        yield all_nodes
        all_nodes.wake_up()
        left = all_nodes.processes_left()
        for name in left:  # so that one test fails for it, not all that follow
            all_nodes.disturb("stop", name)
        all_nodes.restart()
        assert not left, f"processes are left on nodes that were not stopped: {left}"
