"""The list of what each implementation supports, from what the contract suite runs on it.

python -m tests.harness.support > docs/implementations.md
"""

from tests.harness import cases, contract

HEAD = """\
# What each implementation supports

Written by `python -m tests.harness.support > docs/implementations.md` from the cases that the
contract suite ([`tests/ops`](../tests/ops)) runs on each; a test keeps it up to date. The last rows
are those of `tests/ops/test_transformations.py` and `gpu/triton/test_lowering.py`. What is not
supported raises NotImplementedError, and the suite tests that too.

"triton" runs on NVIDIA GPUs only; everywhere else the suite runs its kernels in Triton's
interpreter.

"mosaic" is for compute capability 9.0 and two versions of jax (`rbf_jax/ops/gpu/mosaic/passes.py`).
Without such a GPU some of the cases run in Mosaic's interpreter
(`tests/ops/gpu/mosaic/interpreted/`), and it lowers for sm_90.

"triton" reads a general mask tile by tile and leaves out tiles that are wholly masked; windows,
lengths and segment ids, where they say the same, are faster. In bfloat16 it measures weights from
a bound, not from the largest one, so that a weight of 1 is rounded too: where a row's weight is all
on one key, its output may be off by one unit of bfloat16 (not where a row sees a block of keys or
fewer).

"cudnn" computes dot products only: it requires `key_norm_weight=0`, known when tracing. The suite
runs its cases with that λ, on NVIDIA GPUs only.
"""

HEAD_DIMS = "multiples of 8 up to 256, below compute capability 9.0 up to 128"  # of cuDNN
WHAT = {
    "array_gamma": "γ as an array, per head and differentiable",
    "two_sided_window": "`local_window_size` without `is_causal`",
    "mask": "`mask`, of every broadcastable shape",
    "lengths": "`query_seq_lengths`, `key_value_seq_lengths`",
    "segments": "`query_segment_ids`, `key_value_segment_ids`",
    "alibi": "`alibi_slopes`",
    "global_keys": "`num_global_keys`",
    "sink": "`origin_sink`",
    "sink_logits": "`sink_logits`, a scalar or per head and differentiable",
    "unnormalized": "`normalize=False`",
}


def document() -> str:
    """Returns the Markdown of the list."""
    plain = [contract.SUBJECTS[name] for name in ("xla", "reference")]
    subjects = [contract.TRITON, contract.MOSAIC, contract.CUDNN, *plain]
    rows = [
        ["supported by", *(subject.name for subject in subjects)],
        ["---"] * (1 + len(subjects)),
        ["dtypes", *(", ".join(subject.dtypes) for subject in subjects)],
        ["`is_causal`, also with T ≠ S; grouped heads", *["yes"] * 5],
        ["lengths", "any", "any", "even; odd if causal and T = S", "any", "any"],
        ["λ", "any", "any", "0", "any", "any"],
        ["head dimensions", "up to 256", "up to 256", HEAD_DIMS, "any", "any"],
    ]
    for feature, text in WHAT.items():
        rows.append([text, *("no" if feature in s.refuses else "yes" for s in subjects)])
    rows.append(["`return_residual`", *("yes" if s.logsumexp else "no" for s in subjects)])
    rows.append(["forward-mode derivatives (jvp)", "no", "no", "no", "no", "yes"])
    rows.append(["jvp of grad (Hessian-vector products)", "no", "no", "no", "yes", "yes"])
    rows.append(["grad of grad", "no", "no", "no", "no", "yes"])
    rows.append(["`jax.export`", "with its custom call allowed", "no", "no", "yes", "yes"])
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    names = [f"`{case.name}`" for case in cases.CASES]
    return f"{HEAD}\n{table}\n\nThe {len(names)} cases: {', '.join(names)}.\n"


if __name__ == "__main__":
    print(document(), end="")
