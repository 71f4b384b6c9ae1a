"""RBF attention as a user of PyTorch writes it: FlexAttention with a score_mod.

score_mod adds −γ‖k_j‖², read from a float32 array of norms that is computed from k inside the call,
so that its time counts and the gradient reaches k through it. The norms are compiled by themselves:
in one graph with FlexAttention their gradient has been silently lost (pytorch #162228). The suite
compares every gradient with that of the XLA path, which would show it.

Layout is PyTorch's (B, N, T, H), contiguous; block masks of the causal case are made beforehand;
kernel options are torch.compile's defaults.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from experiments.benchmarks.clock import Call
from experiments.benchmarks.contenders import Arrays, Cell, Prepared


def prepare(cell: Cell, arrays: Arrays, backward: bool) -> Prepared:
    """Compiles one direction, runs it once, and tells what memory that took.

    Raises:
      RuntimeError: PyTorch has no CUDA here.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("PyTorch is installed without CUDA")
    # Every cell is a shape of its own.
    torch._dynamo.config.recompile_limit = 256
    jax.block_until_ready(arrays)
    q, k, v, dout = (torch.from_dlpack(x).transpose(1, 2).contiguous() for x in arrays)
    attend = functools.partial(_attend, gamma=cell.gamma, block_mask=_block_mask(cell))
    if backward:
        for x in (q, k, v):
            x.requires_grad_()
        run = functools.partial(_forward_and_backward, attend, q, k, v, dout)
    else:
        run = functools.partial(_forward, attend, q, k, v)
    run()  # Compiles, and frees what compiling took.
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run()
    torch.cuda.synchronize()
    output_bytes = sum(x.numel() * x.element_size() for x in results)
    peak = torch.cuda.max_memory_allocated() - before
    call = Call(run, lambda _: torch.cuda.synchronize())
    return Prepared(call, peak - output_bytes, output_bytes, _to_jax)


def _attend(q: Any, k: Any, v: Any, gamma: float, block_mask: Any) -> Any:
    norms = _scaled_norms(k, gamma)

    def score_mod(score, b, h, i, j):
        return score - norms[b, h, j]

    return _flex_attention(q, k, v, score_mod=score_mod, block_mask=block_mask, scale=2 * gamma)


@functools.partial(torch.compile, dynamic=False)
def _scaled_norms(k: Any, gamma: float) -> Any:
    return gamma * k.float().square().sum(-1)


_flex_attention = torch.compile(flex_attention, dynamic=False)


def _forward(attend: Any, q: Any, k: Any, v: Any) -> list[Any]:
    with torch.no_grad():
        return [attend(q, k, v)]


def _forward_and_backward(attend: Any, q: Any, k: Any, v: Any, dout: Any) -> list[Any]:
    out = attend(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


@functools.cache
def _causal_mask(length: int) -> Any:
    def causal(b, h, i, j):
        return i >= j

    return create_block_mask(causal, None, None, length, length, device="cuda")


def _block_mask(cell: Cell) -> Any:
    return _causal_mask(cell.length) if cell.causal else None


def _to_jax(results: list[Any]) -> list[jax.Array]:
    torch.cuda.synchronize()
    return [jnp.from_dlpack(x.transpose(1, 2).contiguous()) for x in results]
