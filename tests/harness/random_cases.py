"""Random calls of the kernels against float64, in several processes.

python -m tests.harness.random_cases --count=2000 --seed=0     on an NVIDIA GPU
python -m tests.harness.random_cases --implementation=mosaic   of those that Mosaic takes
python -m tests.harness.random_cases --count=20 --interpret    by Triton's interpreter

Each case is made of its seed alone. What is compiled is drawn from a limited set of options, each
with a few shapes, and is the work of one process, so that it is compiled once; norms, γ, λ and all
arrays are free. Seeds that fail are printed, and kept by --save in failed_seeds.json, which a test
runs again.
"""

import argparse
import collections
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np

FAILED_SEEDS = Path(__file__).with_name("failed_seeds.json")
NUM_STATIC = 96
SHAPES_OF_EACH = 3
LONGEST = 300
# The static choices of seeds that failed before there were `sink_logits` and `num_global_keys`.
WITHOUT_NEWER_OPTIONS = frozenset({20, 21, 24, 25, 28, 42, 47, 54, 59, 65})


def static_choices(index):
    """What is compiled into the kernels."""
    random = np.random.default_rng([0, index])

    def sometimes(probability):
        return random.random() < probability

    causal = sometimes(0.5)
    K, H = (
        int(random.choice([1, 2])),
        random.choice([1, 8, 16, 17, 24, 32, 64, 80, 96, 128, 200, 256]),
    )
    window = tuple(int(2 ** random.uniform(0, 8)) - 1 for _ in range(2)) if sometimes(0.3) else None
    return {
        "dtype": ("bfloat16", "bfloat16", "float32", "float16")[index % 4],
        "H": int(H),
        "K": K,
        "N": K * int(random.choice([1, 1, 2, 3])),
        "is_causal": causal,
        "local_window_size": window,
        "origin_sink": sometimes(0.2),
        "lengths": sometimes(0.3),
        "segments": sometimes(0.3),
        "mask": sometimes(0.25),
        "slopes": sometimes(0.2),
        "per_head": sometimes(0.3),
        "sink_logits": index not in WITHOUT_NEWER_OPTIONS and sometimes(0.3),
        "global_keys": index not in WITHOUT_NEWER_OPTIONS and sometimes(0.3),
    }


def make(seed):
    """The case of a seed and its dtype."""
    from tests.harness import cases
    from tests.harness.adversarial import Adversarial
    from tests.harness.cases import Constant

    static = static_choices(seed % NUM_STATIC)
    dtype, H, N, K = (static[name] for name in ("dtype", "H", "N", "K"))
    random = np.random.default_rng([2, seed % (NUM_STATIC * SHAPES_OF_EACH)])
    B, T, S = (int(x) for x in (1 + random.integers(2), *np.rint(LONGEST ** random.random(2))))
    if random.random() < 0.3:
        S = T
    mask_shape = [n if random.random() < 0.6 else 1 for n in (B, N, T, S)]
    num_global_keys = min(S, int(2 ** random.uniform(0, 7)))
    logits = np.random.default_rng([4, seed]).normal(0, 10, N).astype(np.float32)
    random = np.random.default_rng([1, seed])
    options = {name: static[name] for name in ("is_causal", "local_window_size", "origin_sink")}
    if static["lengths"]:
        options["query_seq_lengths"] = random.integers(0, T + 1, B)
        options["key_value_seq_lengths"] = random.integers(0, S + 1, B)
    if static["segments"]:  # packed or scattered
        ids = random.integers(0, 4, (B, T)), random.integers(0, 4, (B, S))
        if random.random() < 0.7:
            ids = [np.sort(x) for x in ids]
        options["query_segment_ids"], options["key_value_segment_ids"] = ids
    if static["mask"]:
        options["mask"] = random.random(mask_shape) < random.choice([0.1, 0.6, 0.95])
    if static["slopes"]:
        options["alibi_slopes"] = random.random(N).astype(np.float32)
    if static["sink_logits"] and not static["origin_sink"]:
        options["sink_logits"] = logits
    if static["global_keys"]:
        options["num_global_keys"] = num_global_keys
    largest = 3 if dtype == "float16" else 4  # gradients beyond 65,504 are infinite there
    case = Adversarial(
        f"seed {seed}",
        T=T,
        S=S,
        B=B,
        N=N,
        K=K,
        H=H,
        norm=10 ** random.uniform(-4, largest) / np.sqrt(H),
        offset=float(random.choice([0, 0, 0, 10, 60])),
        gamma=None if random.random() < 0.6 else float(10 ** random.uniform(-2, 1)),
        per_head=static["per_head"],
        weight=None if static["per_head"] else float(random.choice([1, 1, 1, 0.3, 1e-3, 0, -0.5])),
        values=float(random.choice([1, 1, 1, 10**largest, 10.0**-largest])),
        options=tuple((name, Constant(x)) for name, x in options.items()),
    )
    assert isinstance(case, cases.Case)
    return case, dtype


def takes(implementation, seed):
    """Whether the implementation supports the case of a seed."""
    static = static_choices(seed % NUM_STATIC)
    refused = static["dtype"] == "float32" or any(
        static[name] for name in ("segments", "mask", "global_keys")
    )
    return implementation != "mosaic" or not refused


def mosaic_tiles(seed):
    """Draws Mosaic's tiles: one or three per CTA, and one or two backward kernels."""
    from tests.harness import contract

    random = np.random.default_rng([3, seed % NUM_STATIC])
    tiles_per_cta, deterministic = int(random.choice([1, 3])), random.random() < 0.4
    head_dim = static_choices(seed % NUM_STATIC)["H"]
    return contract.mosaic_tiles(head_dim, tiles_per_cta, deterministic)


def violations(seed, make_program=None, implementation="triton"):
    """What violates the contract."""
    from tests.harness import contract

    case, dtype = make(seed)
    make_program = make_program or contract.program_of
    mosaic = implementation == "mosaic"
    try:
        subject = contract.MOSAIC if mosaic else contract.TRITON
        with mosaic_tiles(seed) if mosaic else contextlib.nullcontext():
            found = contract.violations(subject, case, dtype, seed, make_program)
    except Exception as error:  # a case that cannot be run has failed
        found = [f"{type(error).__name__}: {str(error)[-1000:]}"]
    contract.expected.cache_clear()
    return [f"seed {seed} ({dtype}, {describe(case)}): {line}" for line in found]


def describe(case):
    """The case in a few words."""
    shapes = ", ".join(f"{name}={getattr(case, name)}" for name in "BTSNKH")
    numbers = f"norm={case.norm:.3g}, offset={case.offset}, gamma={case.gamma}, λ={case.weight}"
    numbers += f", values={case.values:g}"
    options = {name: np.shape(x()) or x() for name, x in case.options}
    return f"{shapes}, {numbers}, {options}"


def work(seeds, implementation, interpret, reports):
    """Runs in a process of its own: reports (seed, violations) of each."""
    from rbf_jax.ops.gpu.triton import launch
    from tests.harness import contract

    with contextlib.ExitStack() as stack:
        if interpret:
            from tests.harness import triton_interpreter

            stack.enter_context(triton_interpreter.interpreted())
        if launch.unavailable():
            raise SystemExit(f"{implementation!r} {launch.unavailable()}: --interpret")
        make_program = functools.lru_cache(maxsize=1)(contract.program_of)
        for seed in seeds:
            reports.put((seed, violations(seed, make_program, implementation)))


def run(seeds, *, implementation, interpret, workers):
    """Yields (seed, violations) of all, as they come; raises where a process dies."""
    shares = collections.defaultdict(list)
    for seed in sorted(seeds, key=lambda seed: seed % (NUM_STATIC * SHAPES_OF_EACH)):
        shares[seed % NUM_STATIC % workers].append(seed)
    context = multiprocessing.get_context("spawn")
    reports = context.Queue()
    processes = [
        context.Process(target=work, args=(share, implementation, interpret, reports), daemon=True)
        for share in shares.values()
    ]
    for process in processes:
        process.start()
    for _ in seeds:
        while reports.empty():
            if any(process.exitcode for process in processes):
                raise RuntimeError("a process died")
            time.sleep(0.05)
        yield reports.get()
    for process in processes:
        process.join()


def failed_seeds():
    """Those that ever failed."""
    return json.loads(FAILED_SEEDS.read_text())["seeds"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--seeds", help="these instead, with commas; 'failed': of the file")
    parser.add_argument("--implementation", choices=("triton", "mosaic"), default="triton")
    parser.add_argument("--interpret", action="store_true", help="by Triton's interpreter")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--save", action="store_true", help="add those that fail to the file")
    given = parser.parse_args()
    # Read by the processes, before they import JAX or Triton.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "2"
    if given.interpret:
        os.environ["JAX_PLATFORMS"] = "cpu"

    if given.interpret and given.implementation != "triton":
        parser.error("--interpret is for --implementation=triton")
    possible = (s for s in itertools.count(given.seed) if takes(given.implementation, s))
    seeds = list(itertools.islice(possible, given.count))
    if given.seeds is not None:
        listed = failed_seeds() if given.seeds == "failed" else given.seeds.split(",")
        seeds = [int(seed) for seed in listed]
    start, failed = time.monotonic(), []
    for done, (seed, found) in enumerate(
        run(
            seeds,
            implementation=given.implementation,
            interpret=given.interpret,
            workers=given.workers,
        ),
        1,
    ):
        for line in found:
            print(line, flush=True)
        failed += [seed] if found else []
        if done % 100 == 0 or done == len(seeds):
            seconds = time.monotonic() - start
            print(f"{done} of {len(seeds)} in {seconds:.0f} s, {len(failed)} failed", flush=True)
    if failed:
        print("failed seeds:", ",".join(map(str, sorted(failed))))
    if given.save:
        kept = sorted({*failed_seeds(), *failed})
        FAILED_SEEDS.write_text(json.dumps({"seeds": kept}) + "\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
