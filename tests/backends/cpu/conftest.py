"""Shared fixtures of the kernels' tests; ``pytestmark = pytest.mark.usefixtures("isa")`` runs a file on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from quire.backends.cpu import _native as native


@pytest.fixture(params=native.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set in use: each that the machine has."""
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back that a test changes."""
    before = native.num_threads()
    yield
    native.set_num_threads(before)
