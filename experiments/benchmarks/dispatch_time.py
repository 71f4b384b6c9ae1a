"""Measures what a call of the operation costs on the host: eager, traced and lowered.

    python -m experiments.benchmarks.dispatch_time [--repeats=5]

The arrays are tiny and on the CPU, so the time is that of Python and of XLA's launch:

* "eager": one call outside of jit whose programs are compiled already.
* "trace": what each further layer of a model costs. JAX has traced the same call before.
* "first", "first gradient": to trace and lower with empty caches.

Each repeat takes the fastest of several calls. The numbers are medians over the repeats, in ms.

To compare two versions, run this file with PYTHONPATH set to each checkout in turn, several times:
the speed of a machine drifts.

    PYTHONPATH=before python experiments/benchmarks/dispatch_time.py
    PYTHONPATH=after python experiments/benchmarks/dispatch_time.py
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rbf_jax import rbf_attention

_EAGER_CALLS, _FIRST_CALLS = 100, 8
# What a model asks for, and a call with many options.
_OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"is_causal": True},
    "options": {
        "is_causal": True,
        "local_window_size": 4,
        "key_value_seq_lengths": jnp.array([8, 5]),
        "alibi_slopes": jnp.full(2, 0.5),
        "gamma": jnp.full(2, 0.3),
        "origin_sink": True,
    },
}


def measure(implementation: str | None, options: dict[str, Any]) -> dict[str, float]:
    """Returns milliseconds of one call by what is done."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 8, 2, 16))
    attend: Any = functools.partial(rbf_attention, implementation=implementation, **options)

    def loss(q, k, v):
        return attend(q, k, v).sum()

    def first(function: Callable) -> None:
        jax.clear_caches()
        jax.jit(function).lower(q, k, v)

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    jax.block_until_ready(attend(q, k, v))
    return {
        "eager": fastest(lambda: jax.block_until_ready(attend(q, k, v)), _EAGER_CALLS),
        # A new function each time: jit finds old ones by identity.
        "trace": fastest(lambda: jax.jit(lambda *x: attend(*x)).trace(q, k, v), _EAGER_CALLS),
        "first": fastest(lambda: first(attend), _FIRST_CALLS),
        "first gradient": fastest(lambda: first(gradient), _FIRST_CALLS),
    }


def fastest(call: Callable[[], Any], times: int) -> float:
    """Returns the milliseconds of the fastest of several calls."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return 1e3 * min(found)


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit status."""
    parser = argparse.ArgumentParser(prog="dispatch_time", description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=_positive, default=5)
    options = parser.parse_args(argv[1:])
    for name, implementation in (("xla", "xla"), ("None", None)):
        for case, arguments in _OPTIONS.items():
            found = [measure(implementation, arguments) for _ in range(options.repeats)]
            for what in found[0]:
                ms = statistics.median(each[what] for each in found)
                print(f"{name:5} {case:8} {what:14} {ms:9.3f} ms", flush=True)
    return 0


def _positive(text: str) -> int:
    """As `options.positive`: this file imports nothing of `experiments`, to run beside another."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
