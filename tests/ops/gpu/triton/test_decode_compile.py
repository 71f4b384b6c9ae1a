"""Attention to a cache compiled for the GPUs it is for, at the sizes it takes there; no GPU needed.

As test_compile.py: Triton's own ptxas makes the machine code, cuobjdump says what it takes.
"""

import functools
import itertools
import re

import jax.numpy as jnp
import pytest

triton = pytest.importorskip("triton")  # Linux only

from rbf_jax.ops.call import Rules  # noqa: E402
from rbf_jax.ops.decode import triton as decode  # noqa: E402
from rbf_jax.ops.decode import triton_kernels  # noqa: E402
from rbf_jax.ops.gpu import device  # noqa: E402
from rbf_jax.ops.gpu.triton import config as tiles  # noqa: E402
from rbf_jax.ops.gpu.triton.tile import Heads  # noqa: E402
from tests.harness.selected import by_default  # noqa: E402
from tests.ops.gpu.triton.test_compile import TYPES, compiled_for, registers_and_stack  # noqa: E402

K, BATCH, LENGTH = 8, 4, 32768
# Bytes of the stack, of large heads in float32 or with many rows.
MOST_SPILLED = 128


def _sizes(rows, head_dim, dtype, target):
    return decode.choose_sizes(
        heads=BATCH * K,
        rows=rows,
        visible=LENGTH,
        head_dim=head_dim,
        dtype=jnp.dtype(dtype),
        target=device.Target("some GPU", target),
    )


@functools.cache
def _compile(sizes, rows, head_dim, dtype, target):
    group = min(rows, 8)
    constants = {
        "RULES": Rules(left=4000, right=0, num_global_keys=1, sink=True, arrays=("alibi_slopes",)),
        "HEADS": Heads(K * group, K, head_dim),
        "QUERIES": rows // group,
        "BLOCK_Q": sizes.tiles.block_q,
        "BLOCK_K": sizes.tiles.block_k,
        "BLOCK_H": tiles.padded_head_dim(head_dim),
        "MAX_REGISTERS": None,
    }
    types = {"out": "*fp32"} if sizes.num_splits > 1 else {}
    return compiled_for(target, triton_kernels.decode_kernel, dtype, constants, sizes.tiles, types)


SOME = [
    *((1, H, "bfloat16", target) for H in (64, 128) for target in (80, 86, 90, 120)),
    *((rows, 128, "bfloat16", 90) for rows in (4, 32, 128)),
    *((rows, 256, "bfloat16", target) for rows in (1, 128) for target in (80, 90)),
    *((rows, H, "float32", target) for rows, H in ((1, 64), (64, 128)) for target in (80, 90)),
    *((1, 256, "float32", target) for target in (80, 86, 90)),
    (8, 80, "float16", 80),
    (16, 16, "float16", 90),
]


@pytest.mark.parametrize(
    ("rows", "head_dim", "dtype", "target"),
    by_default(
        [
            (1, 128, "bfloat16", 90),
            (32, 128, "bfloat16", 90),
            (1, 64, "float32", 80),
            (16, 16, "float16", 90),
        ],
        SOME,
    ),
)
def test_fits(rows, head_dim, dtype, target, tmp_path):
    sizes = _sizes(rows, head_dim, dtype, target)
    compiled = _compile(sizes, rows, head_dim, dtype, target)
    registers, stack = registers_and_stack(compiled, tmp_path)
    assert compiled.metadata.shared <= tiles.shared_memory_limit(target)
    assert registers <= 255
    assert stack <= MOST_SPILLED


def test_several_programs_to_a_multiprocessor(tmp_path):
    """At the sizes that are measured: so that one loads while another computes."""
    for rows in (1, 4):
        sizes = _sizes(rows, 128, "bfloat16", 90)
        compiled = _compile(sizes, rows, 128, "bfloat16", 90)
        registers, stack = registers_and_stack(compiled, tmp_path)
        assert stack == 0
        assert 3 * compiled.metadata.shared <= tiles.shared_memory_limit(90)
        assert 3 * 32 * sizes.tiles.num_warps * registers <= 65536


def test_keys_come_while_others_are_multiplied():
    """In pieces of 16 bytes."""
    ptx = _compile(_sizes(1, 128, "bfloat16", 90), 1, 128, "bfloat16", 90).asm["ptx"]
    assert "mma.sync" in ptx
    assert re.search(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", ptx)


@pytest.mark.parametrize(
    ("num_splits", "dtype"),
    by_default([(128, "bfloat16")], itertools.product((2, 128), TYPES)),
)
def test_merge(num_splits, dtype, tmp_path):
    constants = {
        "HEAD_DIM": 80,
        "BLOCK_SPLITS": num_splits,
        "BLOCK_H": 32,
        "MAX_REGISTERS": None,
    }
    types = dict.fromkeys(("parts", "part_logsumexp"), "*fp32")
    few = tiles.Tiles(16, 16, 4, 1)
    compiled = compiled_for(80, triton_kernels.merge_kernel, dtype, constants, few, types)
    registers, stack = registers_and_stack(compiled, tmp_path)
    assert registers <= 128
    assert stack == 0
