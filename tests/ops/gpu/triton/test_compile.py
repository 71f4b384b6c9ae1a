"""Every tuned tile, and those chosen by rule of thumb, compiled for the GPUs they are for.

No GPU is needed: Triton's own ptxas makes the machine code, cuobjdump says what it takes.
"""

import dataclasses
import functools
import pathlib
import re
import subprocess

import jax.numpy as jnp
import pytest

triton = pytest.importorskip("triton")  # Linux only

from rbf_jax.ops.call import Rules  # noqa: E402
from rbf_jax.ops.gpu.triton import backward, forward  # noqa: E402
from rbf_jax.ops.gpu.triton import config as tiles  # noqa: E402
from rbf_jax.ops.gpu.triton.tile import Heads  # noqa: E402
from tests.harness.selected import by_default  # noqa: E402

BIN = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
KERNELS = {
    "forward": forward.forward_kernel,
    "gate": forward.gate_kernel,
    "queries": backward.queries_kernel,
    "keys": backward.keys_kernel,
}
FLOAT32 = {"norms", "per_head", "logsumexp", "old_logsumexp", "dlogsumexp", "delta", "moments"}
FLOAT32 |= {"column_sums", "gamma", "norm_weight", "slopes"}
INT32 = {
    "starts",
    "lengths",
    "query_lengths",
    "key_lengths",
    "query_segments",
    "key_segments",
    "offsets",
    "bounds",
    "flags",
}
# Bytes of the stack: registers spilled in loops cost time. Tiles that were measured to be fastest
# may spill some, outside of their inner loop as a rule.
MOST_SPILLED = 1024


def _signature(kernel, dtype: str) -> dict[str, str]:
    types = {}
    for name in kernel.arg_names:
        base = name.removesuffix("_ptr")
        if base == name:
            types[name] = "constexpr" if len(name) > 1 and name.isupper() else "i32"
        elif base in FLOAT32:
            types[name] = "*fp32"
        elif base in INT32:
            types[name] = "*i32"
        else:
            types[name] = "*i1" if base == "mask" else f"*{TYPES[dtype]}"
    return types


@functools.cache
def _compile(name: str, chosen: tiles.Tiles, head_dim: int, dtype: str, causal: bool, target: int):
    """Returns what Triton made."""
    kernel = KERNELS[name]
    num_heads = max(1, 2048 // head_dim)
    constants = {
        "RULES": Rules(right=0 if causal else None),
        "HEADS": Heads(num_heads, num_heads, head_dim),
        "BLOCK_Q": chosen.block_q,
        "BLOCK_K": chosen.block_k,
        "BLOCK_H": tiles.padded_head_dim(head_dim),
        "HEADS_AT_ONCE": chosen.heads_at_once,
        "ONLINE": dtype != "bfloat16",
        "HAS_DLOGSUMEXP": False,
        "FLAGS_PER_PROGRAM": 8,
        "MAX_REGISTERS": chosen.max_registers,
    }
    return compiled_for(target, kernel, dtype, constants, chosen)


def compiled_for(target: int, kernel, dtype: str, constants, chosen: tiles.Tiles, types=None):
    """What Triton makes of a kernel; `types` of pointers go before those that names have."""
    signature = _signature(kernel, dtype)
    signature |= {f"{name}_ptr": kind for name, kind in (types or {}).items()}
    source = triton.compiler.ASTSource(
        kernel,
        signature,
        constexprs={key: x for key, x in constants.items() if key in signature},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, argument in enumerate(kernel.arg_names)
            if signature[argument].startswith("*")
        },
    )
    return triton.compile(
        source,
        target=triton.backends.compiler.GPUTarget("cuda", target, 32),
        options={
            "num_warps": chosen.num_warps,
            "num_stages": chosen.num_stages,
            "maxnreg": chosen.max_registers,
        },
    )


def registers_and_stack(compiled, folder) -> tuple[int, int]:
    file = folder / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    command = [str(BIN / "cuobjdump"), "-res-usage", str(file)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found, said
    return int(found[1]), int(found[2])


def _serialized(compiled, folder) -> bool:
    """Whether ptxas says that it could not let the tensor cores' instructions overlap (C75xx)."""
    file = folder / "kernel.ptx"
    file.write_text(compiled.asm["ptx"])
    command = [str(BIN / "ptxas"), "-v", "--gpu-name=sm_90a", str(file), "-o", "/dev/null"]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    return "wgmma.mma_async instructions are serialized" in said.stdout + said.stderr


def _distinct_tuned():
    """One of each configuration; lengths and heads at once make no difference to what is made."""
    seen = {}
    for entry in tiles.tuned_table():
        chosen = tiles.Tiles(**entry["tiles"] | {"heads_at_once": 1})
        key = entry["pass"], chosen, entry["head_dim"], entry["dtype"], entry["causal"]
        seen[key] = entry["compute_capability"]
    return [(*key, target) for key, target in seen.items()]


def _most_common(name, head_dim):
    """The configuration of a pass in bfloat16, causal, of 4,096 tokens, on an H100."""
    call = {"head_dim": head_dim, "dtype": "bfloat16", "causal": True, "length": 4096}
    chosen = tiles.choose(name, **call, gpu="NVIDIA H100 80GB HBM3", compute_capability=90)
    return name, dataclasses.replace(chosen, heads_at_once=1), head_dim, "bfloat16", True, 90


def _fields(x):
    known = isinstance(x, tiles.Tiles)
    return f"{x.block_q}-{x.block_k}-{x.num_warps}-{x.num_stages}" if known else str(x)


def test_the_table_is_not_empty():
    assert len(_distinct_tuned()) > 30


@pytest.mark.parametrize(
    ("name", "chosen", "head_dim", "dtype", "causal", "target"),
    by_default(
        [_most_common(name, H) for name in tiles.PASSES for H in (64, 128)], _distinct_tuned()
    ),
    ids=_fields,
)
def test_tuned_tiles(name, chosen, head_dim, dtype, causal, target, tmp_path):
    compiled = _compile(name, chosen, head_dim, dtype, causal, target)
    registers, stack = registers_and_stack(compiled, tmp_path)
    limit = tiles.shared_memory_limit(target)
    assert compiled.metadata.shared <= tiles.shared_memory(name, chosen, head_dim, dtype) <= limit
    assert registers <= (chosen.max_registers or 255)
    assert stack <= MOST_SPILLED
    if dtype != "float32":
        assert not _serialized(compiled, tmp_path)


DEFAULTS = [
    (name, head_dim, dtype, target)
    for target, dtypes in ((80, TYPES), (90, TYPES), (86, ["bfloat16"]), (89, ["float32"]))
    for name in tiles.PASSES
    for head_dim, dtype in zip((16, 64, 128, 256), (*dtypes, *dtypes, *dtypes, *dtypes))
] + [("forward", 64, "bfloat16", 120), ("keys", 128, "bfloat16", 120)]


@pytest.mark.parametrize(
    ("name", "head_dim", "dtype", "target"),
    by_default(
        [
            ("forward", 16, "bfloat16", 86),
            ("queries", 64, "float16", 80),
            ("keys", 128, "float32", 80),
        ],
        DEFAULTS,
    ),
)
def test_default_tiles(name, head_dim, dtype, target, tmp_path):
    chosen = tiles.default_tiles(name, head_dim, dtype, target)
    compiled = _compile(name, chosen, head_dim, dtype, True, target)
    registers, _ = registers_and_stack(compiled, tmp_path)
    needed = tiles.shared_memory(name, chosen, head_dim, dtype)
    assert compiled.metadata.shared <= needed <= tiles.shared_memory_limit(target)
    assert registers <= 255


def test_gate():
    """It runs with the forward pass's tiles."""
    chosen = tiles.default_tiles("forward", 64, "bfloat16", 90)
    compiled = _compile("gate", chosen, 64, "bfloat16", False, 90)
    assert compiled.metadata.shared <= tiles.shared_memory_limit(90)


def test_dtypes_are_those_of_the_operation():
    assert all(jnp.dtype(name).name == name for name in TYPES)
