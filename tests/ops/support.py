"""The list of what each implementation supports, from what the contract suite runs on it.

python -m tests.ops.support > docs/implementations.md
"""

from tests.ops import cases, contract

HEAD = """\
# What each implementation supports

Written by `python -m tests.ops.support > docs/implementations.md` from the cases that the contract
suite ([`tests/ops`](../tests/ops)) runs on each; a test keeps it up to date. The last rows are
those of `tests/ops/test_transformations.py`. "cudnn" runs on NVIDIA GPUs only; everywhere else the
suite runs the same arithmetic, its augmented heads, through `jax.nn`. What is not supported raises
NotImplementedError, and the suite tests that too.

One thing is not refused and yet wrong: at logits of 10⁷ (‖k‖ about 10⁴) cuDNN's backward pass finds
other weights than its forward pass, its logsumexp being too coarse there. Measured on an H100, jax
0.11.2: the gradient of v is off by a quarter of its norm; everything else keeps the bound.
"""

WHAT = {
    "array_gamma": "γ as an array, per head and differentiable",
    "two_sided_window": "`local_window_size` without `is_causal`",
    "mask": "`mask`, of every broadcastable shape",
    "lengths": "`query_seq_lengths`, `key_value_seq_lengths`",
    "segments": "`query_segment_ids`, `key_value_segment_ids`",
    "alibi": "`alibi_slopes`",
    "sink": "`origin_sink`",
}


def document() -> str:
    """Returns the Markdown of the list."""
    subjects = [contract.SUBJECTS[name] for name in ("xla", "cudnn arithmetic", "reference")]
    rows = [
        ["supported by", *(subject.name.removesuffix(" arithmetic") for subject in subjects)],
        ["---"] * (1 + len(subjects)),
        ["dtypes", *(", ".join(subject.dtypes) for subject in subjects)],
        [
            "`is_causal`, also with T ≠ S; any length; grouped heads; λ per head",
            "yes",
            "yes",
            "yes",
        ],
    ]
    for feature, text in WHAT.items():
        rows.append([text, *("no" if feature in s.refuses else "yes" for s in subjects)])
    rows.append(["`return_residual`", *("yes" if s.logsumexp else "no" for s in subjects)])
    rows.append(["gradients of v where logits reach 10⁷ (‖k‖ ≈ 10⁴)", "yes", "**wrong**", "yes"])
    rows.append(["forward-mode derivatives (jvp)", "no", "no", "yes"])
    rows.append(["jvp of grad (Hessian-vector products)", "yes", "no", "yes"])
    rows.append(["grad of grad", "no", "no", "yes"])
    rows.append(["`jax.export`", "yes", "no", "yes"])
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    names = [f"`{case.name}`" for case in cases.CASES]
    return f"{HEAD}\n{table}\n\nThe {len(names)} cases: {', '.join(names)}.\n"


if __name__ == "__main__":
    print(document(), end="")
