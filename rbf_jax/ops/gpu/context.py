"""Settings that hold within a context."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def setting(variable: contextvars.ContextVar[T], value: T) -> Iterator[None]:
    """Sets a variable within a context."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
