"""Choices that hold within a context."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def override(variable: contextvars.ContextVar[T], value: T) -> Iterator[None]:
    """Within this context the variable has the value."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
