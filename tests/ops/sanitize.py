"""A small run of each Triton kernel, for NVIDIA's compute-sanitizer, on a GPU.

compute-sanitizer --tool memcheck python3 -m tests.ops.sanitize      (and racecheck, initcheck)

Every array is an allocation of its own, no CUDA graph hides a launch, and XLA compares no programs
of its own (which reads memory that nothing wrote). Names of cases may follow; without, all are run.
The last line says which kernels ran, and how often.
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
os.environ["XLA_FLAGS"] += " --xla_gpu_autotune_level=0"

import collections
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from rbf_jax import rbf_attention
from rbf_jax.ops.triton import launch
from tests.ops import adversarial, cases

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
    cases.BY_NAME["far_keys_causal"],
    next(case for case in adversarial.CASES if case.name == "some_far"),
]


def main():
    reason = launch.unavailable()
    if reason is not None:
        raise SystemExit(f"implementation='triton' {reason}.")
    ran = collections.Counter()
    bind = launch.run

    def counting(kernel, *arguments, **rest):
        ran[kernel.__name__] += 1
        return bind(kernel, *arguments, **rest)

    launch.run = counting
    names = sys.argv[1:] or [case.name for case in CASES]
    for case in (case for case in CASES if case.name in names):
        for dtype in ("bfloat16", "float32"):
            q, k, v, gamma, weight, dout, dlogsumexp = case.arrays(jnp.dtype(dtype))
            attend = functools.partial(
                rbf_attention,
                gamma=gamma,
                key_norm_weight=weight,
                implementation="triton",
                return_residual=True,
                **case.resolved_options(),
            )
            out, vjp = jax.vjp(attend, q, k, v)
            results = jax.block_until_ready((out, vjp((dout, dlogsumexp))))
            finite = all(np.isfinite(np.asarray(x, np.float32)).all() for x in results[1])
            print(case.name, dtype, "finite" if finite else "NOT FINITE", flush=True)
    print(", ".join(f"{name} {count}" for name, count in sorted(ran.items())))


if __name__ == "__main__":
    main()
