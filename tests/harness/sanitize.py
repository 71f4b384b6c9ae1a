"""A small run of each kernel under NVIDIA's compute-sanitizer, on a GPU.

python3 -m tests.harness.sanitize --tool=memcheck      (and racecheck, initcheck; Triton's kernels)
python3 -m tests.harness.sanitize --tool=memcheck --implementation=mosaic

Of Mosaic's that is the forward kernel with one tile of queries to a CTA, and the one backward
kernel; then the forward kernel with three tiles to a CTA, and two backward kernels.

Every case is run in a process of its own: python3 -m tests.harness.sanitize CASE. Every array is an
allocation of its own, no CUDA graph hides a launch, and XLA compares no programs of its own (which
reads memory that nothing wrote). The sanitizer itself dies of a segmentation fault in some runs of
JAX, always elsewhere: such a run says nothing and is repeated.
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
os.environ["XLA_FLAGS"] += " --xla_gpu_autotune_level=0"

import argparse
import collections
import contextlib
import functools
import signal
import subprocess
import sys
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np

from rbf_jax import rbf_attention
from rbf_jax.ops.gpu.triton import launch
from tests.harness import adversarial, cases, contract

TRIES = 8

# Several tiles, none of them whole at the end; every rule once; the gate taken, not taken, by some.
CASES = [
    cases.case("full", T=150, S=203, K=1, H=64),
    cases.case("causal", T=203, S=203, H=64, is_causal=True),
    cases.case("head_dim", T=70, S=90, H=80, is_causal=True),
    cases.case("window", T=203, S=203, H=32, local_window_size=(70, 9)),
    cases.BY_NAME["one_of_each"],
    cases.BY_NAME["lengths_zero"],
    cases.BY_NAME["mask_BS"],
    cases.BY_NAME["segments_causal"],
    cases.BY_NAME["everything"],
    cases.BY_NAME["global_keys_everything"],
    cases.BY_NAME["far_keys_causal"],
    next(case for case in adversarial.CASES if case.name == "some_far"),
]


# Of each case: the dtype, and whether Mosaic's tiles are others than it chooses for one so small.
RUNS = {
    "triton": (("bfloat16", False), ("float32", False)),
    "mosaic": (("bfloat16", False), ("float16", False), ("bfloat16", True)),
}


def cases_of(implementation):
    """The cases that it supports."""
    refused = contract.MOSAIC.refuses if implementation == "mosaic" else frozenset()
    return [case for case in CASES if not case.features & refused]


def run(implementation, name):
    """All kernels on one case; the last line says which of Triton's ran, and how often."""
    reason = launch.unavailable()
    if reason is not None:
        raise SystemExit(f"implementation={implementation!r} {reason}.")
    ran = collections.Counter()
    bind = launch.run

    def counting(kernel, *arguments, **rest):
        ran[kernel.__name__] += 1
        return bind(kernel, *arguments, **rest)

    launch.run = counting
    case = next(case for case in CASES if case.name == name)
    for dtype, others in RUNS[implementation]:
        q, k, v, gamma, weight, dout, dlogsumexp = case.arrays(jnp.dtype(dtype))
        attend = functools.partial(
            rbf_attention,
            gamma=gamma,
            key_norm_weight=weight,
            implementation=implementation,
            return_residual=True,
            **case.resolved_options(),
        )
        head_dim = q.shape[-1]
        with contract.mosaic_tiles(head_dim, 3, True) if others else contextlib.nullcontext():
            out, vjp = jax.vjp(attend, q, k, v)
            results = jax.block_until_ready((out, vjp((dout, dlogsumexp))))
        finite = all(np.isfinite(np.asarray(x, np.float32)).all() for x in results[1])
        print(name, dtype, "finite" if finite else "NOT FINITE", flush=True)
    print(", ".join(f"{kernel} {count}" for kernel, count in sorted(ran.items())))


def sanitize(tool, implementation, name):
    """Runs a case under the sanitizer; returns whether it is clean and prints what was said."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
    if tool != "initcheck":  # which must see all that is written
        command += ["--kernel-regex", "kns=_kernel"]
    command += [sys.executable, "-m", "tests.harness.sanitize", name]
    command += ["--implementation", implementation]
    for attempt in range(1, TRIES + 1):  # noqa: B007
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode not in (-signal.SIGSEGV, 128 + signal.SIGSEGV):
            break
    lines = run.stdout.splitlines()
    finite = sum(line.endswith(" finite") for line in lines)
    clean = run.returncode == 0 and finite == len(RUNS[implementation])
    print(f"{tool} {name}, attempt {attempt}: {'clean' if clean else 'NOT CLEAN'}", flush=True)
    for line in lines[-3:] if clean else [*lines[-40:], *run.stderr.splitlines()[-20:]]:
        print("   ", line, flush=True)
    return clean


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("case", nargs="?", help="run it here, without the sanitizer")
    parser.add_argument("--tool", choices=["memcheck", "racecheck", "initcheck"])
    parser.add_argument("--implementation", choices=sorted(RUNS), default="triton")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1))
    given = parser.parse_args()
    if given.case:
        return run(given.implementation, given.case)
    if not given.tool:
        parser.error("a case or --tool is required")
    with futures.ThreadPoolExecutor(given.workers) as pool:
        check = functools.partial(sanitize, given.tool, given.implementation)
        clean = list(pool.map(check, [case.name for case in cases_of(given.implementation)]))
    print(f"{given.tool}: {sum(clean)} of {len(clean)} cases clean")
    sys.exit(not all(clean))


if __name__ == "__main__":
    main()
