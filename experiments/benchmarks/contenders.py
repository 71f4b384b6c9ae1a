"""What the GPU suite measures: each contender makes, of a cell, a call and what memory it takes.

Programs of JAX are traced one by one, where jax-triton compiles its kernels, and compiled by XLA
side by side: most of the suite's time would else be that.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax

from experiments.benchmarks.clock import Call
from rbf_jax import rbf_attention
from rbf_jax.ops.gpu import device

Arrays = Sequence[jax.Array]

BASELINE = "dot product, cuDNN"
TRITON = "RBF triton"
MOSAIC = "RBF mosaic"
# The RBF that the others are compared with: it runs everywhere and is tested against float64.
TRUSTED = "RBF xla"
FLEX = "RBF FlexAttention"


@dataclasses.dataclass(frozen=True)
class Cell:
    """The size of one attention, T = S."""

    batch: int
    length: int
    heads: int
    head_dim: int
    causal: bool
    group: int = 1  # query heads that share a head of keys and values
    dtype: str = "bfloat16"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, T, N, H)."""
        return self.batch, self.length, self.heads, self.head_dim

    @property
    def gamma(self) -> float:
        """The default γ; a dot product has the same logits' scale with 2γ."""
        return self.head_dim**-0.5

    def operations(self, backward: bool) -> float:
        """Of the matrix products: two of them forward, five more backward; causal half."""
        forward = 4.0 * self.length**2 * self.head_dim * self.heads * self.batch
        return forward * (0.5 if self.causal else 1.0) * (3.5 if backward else 1.0)

    def arrays(self) -> list[jax.Array]:
        """Random q, k, v and cotangent: on zeros a GPU draws less power and runs faster."""
        keys = jax.random.split(jax.random.key(0), 4)
        few = (self.batch, self.length, self.heads // self.group, self.head_dim)
        shapes = (self.shape, few, few, self.shape)
        return [jax.random.normal(key, shape, self.dtype) for key, shape in zip(keys, shapes)]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A contender, ready for one cell and direction.

    Attributes:
      call: what is measured.
      temporary_bytes: what it needs beside inputs and results.
      output_bytes: of its results.
      results: turns what the call returns into JAX arrays (B, T, N, H): the output, and the
        gradients of q, k, v.
    """

    call: Call
    temporary_bytes: int
    output_bytes: int
    results: Callable[[Any], list[jax.Array]]


# Of a cell, its arrays and whether there is a backward pass, what waits for the compiler.
Start = Callable[[Cell, Arrays, bool], Callable[[], Prepared]]

_compilers = concurrent.futures.ThreadPoolExecutor(8)


def forward_and_backward(attend: Callable) -> Callable:
    """Output and the gradients of q, k, v for a given cotangent."""

    def both(q, k, v, dout):
        out, vjp = jax.vjp(attend, q, k, v)
        return out, vjp(dout)

    return both


def dot_product(cell: Cell, implementation: str) -> Callable:
    """jax.nn's dot product at the scale of RBF attention's logits."""
    return functools.partial(
        jax.nn.dot_product_attention,
        scale=2 * cell.gamma,
        is_causal=cell.causal,
        implementation=implementation,
    )


def rbf(cell: Cell, implementation: str) -> Callable:
    """This project's operation."""
    attend: Any = functools.partial(rbf_attention, is_causal=cell.causal)
    return functools.partial(attend, implementation=implementation)


def start_compiling(
    attend: Callable, arrays: Sequence[Any], backward: bool
) -> concurrent.futures.Future[jax.stages.Compiled]:
    """Compiles one direction for arrays, or shapes, of q, k, v and the cotangent."""
    if backward:
        lowered = jax.jit(forward_and_backward(attend)).lower(*arrays)
    else:
        lowered = jax.jit(attend).lower(*arrays[:3])
    return _compilers.submit(lowered.compile)


def memory(program: jax.stages.Compiled) -> Any:
    """The compiler's memory analysis of a program.

    Raises:
      RuntimeError: the backend has none.
    """
    analysis = program.memory_analysis()
    if analysis is None:
        raise RuntimeError(f"{jax.default_backend()} does not tell what memory a program needs.")
    return analysis


def contenders() -> dict[str, Start]:
    """By name, the baseline first.

    The Mosaic kernel only where the GPU is one for it, FlexAttention where PyTorch is installed.
    """
    found: dict[str, Start] = {
        BASELINE: _jax_contender(functools.partial(dot_product, implementation="cudnn")),
        TRITON: _jax_contender(functools.partial(rbf, implementation="triton")),
        TRUSTED: _jax_contender(functools.partial(rbf, implementation="xla")),
    }
    if device.unavailable() is None and device.target().compute_capability == 90:
        found[MOSAIC] = _jax_contender(functools.partial(rbf, implementation="mosaic"))
    if importlib.util.find_spec("torch") is not None:
        found[FLEX] = _flex
    return found


def _flex(cell: Cell, arrays: Arrays, backward: bool) -> Callable[[], Prepared]:
    def finish() -> Prepared:
        # Not before the baseline has loaded JAX's cuDNN: PyTorch brings another.
        from experiments.benchmarks import flex

        return flex.prepare(cell, arrays, backward)

    return finish


def _jax_contender(make: Callable[[Cell], Callable]) -> Start:
    def start(cell: Cell, arrays: Arrays, backward: bool) -> Callable[[], Prepared]:
        compiling = start_compiling(make(cell), arrays, backward)
        arguments = arrays if backward else arrays[:3]

        def finish() -> Prepared:
            program = compiling.result()
            analysis = memory(program)
            return Prepared(
                Call(lambda: program(*arguments), jax.block_until_ready),
                analysis.temp_size_in_bytes,
                analysis.output_size_in_bytes,
                jax.tree.leaves,
            )

        return finish

    return start
