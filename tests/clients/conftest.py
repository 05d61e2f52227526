"""Clients of other projects, unchanged, against a real server. Heavy to install: ``make test-clients``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from server.harness import Process


@pytest.fixture(scope="package")
def server() -> Iterator[Process]:
    process = Process()
    yield process
    process.stop()
