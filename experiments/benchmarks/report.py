"""The GPU suite's Markdown tables, made of its JSON file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.benchmarks.contenders import BASELINE
from experiments.benchmarks.gpu_suite import doubtful

Row = Mapping[str, Any]


def markdown(content: Mapping[str, Any]) -> str:
    """Returns machine and ceilings, a table per H and causality, and the memory table."""
    parts = [_head(content)]
    groups = {(row["head_dim"], row["causal"]) for row in content["results"]}
    for head_dim, causal in sorted(groups, key=lambda group: (group[0], not group[1])):
        rows = [r for r in content["results"] if (r["head_dim"], r["causal"]) == (head_dim, causal)]
        parts.append(f"## H {head_dim}, {'causal' if causal else 'full'}\n\n{_times(rows)}")
    if content["memory"]:
        parts.append(f"## Memory\n\n{_memory(content['memory'])}")
    if content["not_measured"]:
        cells = (
            f"H {c['head_dim']} {'causal' if c['causal'] else 'full'} T {c['length']}"
            for c in content["not_measured"]
        )
        parts.append(f"Not measured, the time was over: {', '.join(cells)}.\n")
    return "\n".join(parts)


def _head(content: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    ceilings, settings = content["ceilings"], content["settings"]
    return (
        "# Attention on one GPU, device time\n\n"
        f"`{content['command']}`\n\n"
        f"{content['device']}, {content['date']}; {versions}. "
        f"B·T = {settings['tokens']:,}, N·H = {settings['width']:,}, N/K = "
        f"{settings.get('group', 1)}, {content['dtype']}, random "
        f"normal inputs; median of {settings['rounds']} rounds in which all take turns. Clock: "
        f"{content['clock']['meaning']}. Speed is that of the dot product's time over the "
        'implementation\'s: above 1 is faster. MiB: temporaries and results. "Queued" is the '
        "host's time per call of a queue, launches included.\n\n"
        f"Ceilings in the same run: matrix product {ceilings['matmul_tflops']:.0f} TFLOP/s, memory "
        f"{ceilings['copy_gigabytes_per_second']:,.0f} GB/s read and written.\n"
    )


def _times(rows: Sequence[Row]) -> str:
    cells = {(r["length"], r["implementation"], r["direction"]): r for r in rows}
    both = ("forward", "forward+backward")
    lines = [
        "| T | implementation | forward, ms | TFLOP/s | speed | queued, ms | MiB "
        "| forward + backward, ms | TFLOP/s | speed | queued, ms | MiB | remarks |",
        "|---:|---" + "|---:" * 10 + "|---|",
    ]
    for length in sorted({r["length"] for r in rows}):
        for name in dict.fromkeys(r["implementation"] for r in rows):
            texts, remarks = [f"{length:,}", name], []
            for direction in both:
                row = cells.get((length, name, direction))
                texts += _measured(row, cells.get((length, BASELINE, direction)))
                remarks += _remarks(row)
            lines.append(f"| {' | '.join([*texts, '; '.join(dict.fromkeys(remarks))])} |")
    return "\n".join(lines) + "\n"


def _measured(row: Row | None, baseline: Row | None) -> list[str]:
    if row is None or row["milliseconds"] is None:
        return ["-", "", "", "", ""]
    speed = ""
    if baseline is not None and baseline["milliseconds"] is not None:
        speed = f"{baseline['milliseconds'] / row['milliseconds']:.2f}"
    mebibytes = (row["temporary_bytes"] + row["output_bytes"]) / 2**20
    times = (f"{row['milliseconds']:.3f}", f"{row['tflops']:.0f}", speed)
    return [*times, f"{row['wall_milliseconds']:.3f}", f"{mebibytes:,.0f}"]


def _remarks(row: Row | None) -> list[str]:
    if row is None:
        return []
    if row["error"] is not None:
        # A table's cell ends at a bar.
        return [row["error"].replace("|", "/")]
    return doubtful(row)


def _memory(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    cells = {(row["implementation"], row["length"]): row for row in rows}
    limit = rows[0]["bytes_limit"]
    of = "" if limit is None else f" of {limit / 2**30:.0f} GiB that JAX may use"
    lines = [
        "Temporaries of forward + backward, compiled for B 1, N 8, H 64, bfloat16, causal; an "
        f"implementation runs out where these, inputs and results exceed the memory{of}.\n",
        "| T | " + " | ".join(names) + " |",
        "|---:|" + "---:|" * len(names),
    ]
    for length in sorted({row["length"] for row in rows}):
        texts = [_memory_cell(cells.get((name, length))) for name in names]
        lines.append(f"| {length:,} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def _memory_cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row["error"] is not None:
        exhausted = "RESOURCE_EXHAUSTED" in row["error"]
        return "runs out" if exhausted else row["error"].replace("|", "/")
    size = row["temporary_bytes"]
    text = f"{size / 2**30:,.1f} GiB" if size >= 10 * 2**30 else f"{size / 2**20:,.1f} MiB"
    if row["runs_out"]:
        return f"runs out: {text}"
    return text + (f", run in {row['milliseconds']:,.0f} ms" if "milliseconds" in row else "")
