"""The list of what each implementation supports, from what the contract suite runs on it.

python -m tests.harness.support > docs/implementations.md
"""

from tests.harness import cases, contract

HEAD = """\
# What each implementation supports

Written by `python -m tests.harness.support > docs/implementations.md` from the cases that the
contract suite ([`tests/ops`](../tests/ops)) runs on each; a test keeps it up to date. The last rows
are those of `tests/ops/test_transformations.py` and `gpu/triton/test_lowering.py`. "triton" and
"cudnn" run on NVIDIA GPUs only; everywhere else the suite runs the kernels by Triton's interpreter,
and cuDNN's augmented heads through `jax.nn`. What is not supported raises NotImplementedError, and
the suite tests that too.

"mosaic" is for compute capability 9.0 and two versions of jax (`rbf_jax/ops/gpu/mosaic/passes.py`).
Without such a GPU some of the cases run in Mosaic's interpreter
(`tests/ops/gpu/mosaic/interpreted/`), and it lowers for sm_90.

"triton" reads a general mask tile by tile and leaves out tiles that are wholly masked; windows,
lengths and segment ids, where they say the same, are faster. In bfloat16 it measures weights from
a bound, not from the largest one, so that a weight of 1 is rounded too: where a row's weight is all
on one key, its output may be off by one unit of bfloat16 (not where a row sees a block of keys or
fewer).

One thing is not refused and yet wrong in "cudnn": at logits of 10⁷ (‖k‖ about 10⁴) its backward
pass finds other weights than its forward pass, cuDNN's logsumexp being too coarse there. Measured
on an H100, jax 0.11.2: the gradient of v is off by a quarter of its norm; everything else keeps the
bound.
"""

WHAT = {
    "array_gamma": "γ as an array, per head and differentiable",
    "two_sided_window": "`local_window_size` without `is_causal`",
    "mask": "`mask`, of every broadcastable shape",
    "lengths": "`query_seq_lengths`, `key_value_seq_lengths`",
    "segments": "`query_segment_ids`, `key_value_segment_ids`",
    "alibi": "`alibi_slopes`",
    "sink": "`origin_sink`",
    "unnormalized": "`normalize=False`",
}


def document() -> str:
    """Returns the Markdown of the list."""
    others = [contract.SUBJECTS[name] for name in ("cudnn arithmetic", "xla", "reference")]
    subjects = [contract.TRITON, contract.MOSAIC, *others]
    rows = [
        ["supported by", *(subject.name.removesuffix(" arithmetic") for subject in subjects)],
        ["---"] * (1 + len(subjects)),
        ["dtypes", *(", ".join(subject.dtypes) for subject in subjects)],
        ["`is_causal`, also with T ≠ S; any length; grouped heads; λ per head", *["yes"] * 5],
        ["head dimensions", "up to 256", "up to 256", "up to 248, on some GPUs 120", "any", "any"],
    ]
    for feature, text in WHAT.items():
        rows.append([text, *("no" if feature in s.refuses else "yes" for s in subjects)])
    rows.append(["`return_residual`", *("yes" if s.logsumexp else "no" for s in subjects)])
    huge = "gradients of v where logits reach 10⁷ (‖k‖ ≈ 10⁴)"
    rows.append([huge, "yes", "yes", "**wrong**", "yes", "yes"])
    rows.append(["forward-mode derivatives (jvp)", "no", "no", "no", "no", "yes"])
    rows.append(["jvp of grad (Hessian-vector products)", "no", "no", "no", "yes", "yes"])
    rows.append(["grad of grad", "no", "no", "no", "no", "yes"])
    rows.append(["`jax.export`", "with its custom call allowed", "no", "no", "yes", "yes"])
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    names = [f"`{case.name}`" for case in cases.CASES]
    return f"{HEAD}\n{table}\n\nThe {len(names)} cases: {', '.join(names)}.\n"


if __name__ == "__main__":
    print(document(), end="")
