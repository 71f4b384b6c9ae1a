"""What a run of the GPU suite might have written: made up, with simple laws of T."""

from experiments.benchmarks.contenders import BASELINE, FLEX, TRITON, TRUSTED

LENGTHS = (512, 4096)
# Milliseconds per 1,024 keys, forward; backward takes 2.5 times as long.
COST = {BASELINE: 1.0, TRITON: 1.25, TRUSTED: 10.0, FLEX: 4.0}
GIBIBYTES = 2**30


def row(name, head_dim, causal, length, direction):
    milliseconds = COST[name] * length / 1024 * (1 if direction == "forward" else 3.5)
    return {
        "implementation": name,
        "batch": 16384 // length,
        "length": length,
        "heads": 2048 // head_dim,
        "head_dim": head_dim,
        "causal": causal,
        "direction": direction,
        "milliseconds": milliseconds,
        "fastest_slowest": [milliseconds, milliseconds],
        "wall_milliseconds": milliseconds + 0.007,
        "tflops": 100.0,
        "kernels": {},
        "temporary_bytes": 3 * 2**20,
        "output_bytes": 2**20,
        "difference": {"out": 0.003},
        "error": None,
    }


def failed(row, error):
    kept = ("implementation", "batch", "length", "heads", "head_dim", "causal", "direction")
    return {**{name: row[name] for name in kept}, "milliseconds": None, "error": error}


def memory_row(name, length, temporary_bytes, **more):
    return {
        "implementation": name,
        "length": length,
        "bytes_limit": 60 * GIBIBYTES,
        "error": None,
        "temporary_bytes": temporary_bytes,
        "output_bytes": 0,
        "argument_bytes": 0,
        "runs_out": temporary_bytes > 60 * GIBIBYTES,
        **more,
    }


def make_content():
    results = [
        row(name, head_dim, causal, length, direction)
        for length in LENGTHS
        for head_dim in (64, 128)
        for causal in (True, False)
        for direction in ("forward", "forward+backward")
        for name in COST
    ]
    lengths = [1024 << i for i in range(9)]
    memory = [memory_row("RBF reference", T, 32 * T * T) for T in lengths if T <= 65536]
    memory += [memory_row("dot product, jax.nn xla", T, 48 * T * T) for T in lengths if T <= 65536]
    memory += [memory_row("RBF xla", T, 4096 * T) for T in lengths]
    memory += [memory_row(TRITON, T, 64 * T) for T in lengths[:-1]]
    memory.append(memory_row(TRITON, lengths[-1], 64 * lengths[-1], milliseconds=712.0))
    return {
        "command": "python -m experiments.bench_attention --suite=gpu",
        "device": "Imagined GPU",
        "versions": {"jax": "0.11.2"},
        "date": "2026-11-24T00:00:00+00:00",
        "clock": {"name": "cupti", "meaning": "milliseconds by CUPTI", "no_cupti": None},
        "dtype": "bfloat16",
        "settings": {"tokens": 16384, "width": 2048, "rounds": 7},
        "ceilings": {"matmul_tflops": 700.0, "copy_gigabytes_per_second": 2900.0},
        "results": results,
        "memory": memory,
        "not_measured": [],
    }
