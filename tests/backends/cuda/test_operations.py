"""Kernels and reference are the same operations: one takes the other's place by its name, with the same arguments."""

from __future__ import annotations

import inspect

import pytest

from quire.backends.cuda.kernels import operations as kernels
from quire.backends.cuda.reference import operations as reference


def test_the_same_operations() -> None:
    assert kernels.__all__ == reference.__all__


@pytest.mark.parametrize("name", reference.__all__)
def test_the_same_arguments(name: str) -> None:
    assert inspect.signature(getattr(kernels, name)) == inspect.signature(getattr(reference, name))
