"""What ring attention sends: bytes per device, against sequence length and number of devices.

    python -m experiments.ring_traffic [--out=FILE.json] [--lengths=4096,32768] [--devices=4,8,16]

One attention layer, forward and forward + backward, sequences split over all devices. The bytes are
those that the algorithm says, and those of the collectives in the compiled program times the turns
of the loops that they are in. The program is compiled for CPU devices that this machine pretends
to have, and not run; XLA widens bfloat16 collectives there, so the comparison is in float32.

A block's transfer is hidden where computing on one takes longer: so many tokens per device are
needed for it, at the speeds given.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.benchmarks.options import command_line, json_file, lengths
from rbf_jax.data.files import write_text

_ITEM_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1, "s8": 1}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_PERMUTE = re.compile(r"= \(?(\w+)\[([\d,]*)\][^=]* collective-permute(?:-start)?\(")
_OTHER = re.compile(r" (all-gather|all-to-all|reduce-scatter)(?:-start)?\(")
_WHILE = re.compile(r" while\(.*body=%?([\w.\-]+)")
_CALLED = re.compile(r"(?:to_apply|calls|condition)=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Layer:
    """One attention layer; B, N, K, H as everywhere."""

    batch: int = 1
    heads: int = 16
    kv_heads: int = 16
    head_dim: int = 128
    dtype: str = "bfloat16"

    @property
    def item_bytes(self) -> int:
        """Of a number of q, k or v."""
        return 4 if self.dtype == "float32" else 2

    def predicted(self, length: int, devices: int, causal: bool) -> tuple[int, int]:
        """Bytes that a device sends, forward and forward + backward."""
        tokens = length // devices * self.batch
        item = self.item_bytes
        queries = tokens * self.heads * self.head_dim
        keys = tokens * self.kv_heads * self.head_dim
        rows = tokens * self.heads * 4  # the logsumexp, float32
        turns = devices - 1
        block = 2 * keys * item + tokens * self.kv_heads * 4  # the norms are float32
        forward = turns * block
        backward = turns * (block + 2 * keys * 4) + 2 * keys * 4  # so are gradients
        if causal:  # into zig-zag order and back
            forward += (queries + 2 * keys) * item + queries * 4 + rows
            # q, k and v are kept in that order from the forward pass.
            backward += 2 * queries * item + 2 * rows + (queries + 2 * keys) * 4
        return forward, forward + backward

    def hidden_above(self, flops: float, link: float) -> tuple[float, float]:
        """Tokens per device from which on a turn computes longer than it sends, by pass.

        Under a causal rule a turn of c tokens per device takes 2·B·N·c²·H floating point
        operations, backward 2.5 times as many. Without one it is twice as many, and half the
        tokens are enough.
        """
        computed = 2 * self.heads * self.head_dim
        gradients = 2 * self.kv_heads * self.head_dim * 4
        block = 2 * self.kv_heads * self.head_dim * self.item_bytes + self.kv_heads * 4
        forward = block / link * flops / computed
        return forward, (block + gradients) / link * flops / (2.5 * computed)

    def norms(self, devices: int, causal: bool) -> dict[str, float]:
        """What a key's norm costs a device, sent round or made again in every turn.

        Each pair of chunks would make those of its key chunk: under a causal rule twice a turn.
        """
        times = devices * (2 if causal else 1)
        key, norm = self.head_dim * self.item_bytes, 4
        return {
            "share_of_block": norm / (2 * key + norm),
            "sent_bytes": (devices - 1) * norm,
            "made_flops": times * 2 * self.head_dim,
            "made_memory_bytes": times * (key + norm),
        }


def bytes_sent(program: str) -> int:
    """Bytes that a device sends by the collective-permutes of a compiled program.

    Raises:
      ValueError: it has collectives of another kind, or a loop whose turns are not known.
    """
    own: dict[str, int] = {}
    calls: dict[str, list[tuple[str, int]]] = {}
    name, entry = "", ""
    for line in program.splitlines():
        if found := _COMPUTATION.match(line):
            name = found[1]
            own[name], calls[name] = 0, []
            entry = name if line.startswith("ENTRY") else entry
        elif found := _PERMUTE.search(line):
            shape = [int(n) for n in found[2].split(",") if n]
            size = _ITEM_BYTES[found[1]]
            for n in shape:
                size *= n
            own[name] += size
        elif found := _OTHER.search(line):
            raise ValueError(f"the program has {found[1]}, which ring attention does not need.")
        elif found := _WHILE.search(line):
            trips = _TRIPS.search(line)
            calls[name].append((found[1], int(trips[1]) if trips else -1))
        else:
            calls.setdefault(name, []).extend((x, 1) for x in _CALLED.findall(line))

    def total(name: str) -> int:
        size = own.get(name, 0)
        for called, trips in calls.get(name, []):
            inside = total(called)
            if inside and trips < 0:
                raise ValueError(f"the loop {called} sends, and its number of turns is not known.")
            size += inside * trips
        return size

    return total(entry)


def compiled_bytes(layer: Layer, length: int, devices: int, causal: bool) -> tuple[int, int]:
    """What `Layer.predicted` says, from compiled programs."""
    import jax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from rbf_jax import rbf_attention

    mesh = jax.make_mesh(
        (devices,), ("seq",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    sharding = NamedSharding(mesh, PartitionSpec(None, "seq"))

    def shape(heads):
        size = (layer.batch, length, heads, layer.head_dim)
        return jax.ShapeDtypeStruct(size, layer.dtype, sharding=sharding)

    query, key = shape(layer.heads), shape(layer.kv_heads)

    def forward(q, k, v):
        return rbf_attention(q, k, v, is_causal=causal, implementation="xla")

    def both(q, k, v, dout):
        out, vjp = jax.vjp(forward, q, k, v)
        return out, vjp(dout)

    with jax.set_mesh(mesh):
        programs = (
            jax.jit(forward).lower(query, key, key),
            jax.jit(both).lower(query, key, key, query),
        )
        sent = [bytes_sent(program.compile().as_text() or "") for program in programs]
    return sent[0], sent[1]


def table(layer: Layer, all_lengths: Sequence[int], all_devices: Sequence[int]) -> list[dict]:
    """One row per length, number of devices and rule."""
    wide = dataclasses.replace(layer, dtype="float32")
    rows = []
    for causal in (True, False):
        for length in all_lengths:
            for devices in all_devices:
                sent = layer.predicted(length, devices, causal)
                rows.append(
                    {
                        "causal": causal,
                        "length": length,
                        "devices": devices,
                        "forward_bytes": sent[0],
                        "both_bytes": sent[1],
                        "float32_predicted_bytes": wide.predicted(length, devices, causal),
                        "float32_compiled_bytes": compiled_bytes(wide, length, devices, causal),
                    }
                )
                print(_line(rows[-1]), flush=True)
    return rows


def _line(row: dict) -> str:
    mebibytes = [row["forward_bytes"], row["both_bytes"]]
    mebibytes += [*row["float32_predicted_bytes"], *row["float32_compiled_bytes"]]
    numbers = " | ".join(f"{x / 2**20:,.1f}" for x in mebibytes)
    rule = "causal" if row["causal"] else "full"
    return f"| {rule} | {row['length']:,} | {row['devices']} | {numbers} |"


HEADER = """\
| MiB | T | devices | forward | and backward | float32: forward | both | compiled: forward | both |
|---|---:|---:|---:|---:|---:|---:|---:|---:|"""


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit status."""
    parser = argparse.ArgumentParser(description="What ring attention sends.")
    parser.add_argument("--lengths", type=lengths, default=[4096, 32768, 131072])
    parser.add_argument("--devices", type=lengths, default=[4, 8, 16])
    parser.add_argument("--tflops", type=float, default=400.0, help="of a device's attention")
    parser.add_argument("--out", type=json_file, default="runs/ring_traffic.json")
    given = parser.parse_args(argv[1:])
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={max(given.devices)}"
    layer = Layer()
    print(HEADER)
    rows = table(layer, given.lengths, given.devices)
    hidden = {
        f"{link} GB/s": layer.hidden_above(given.tflops * 1e12, link * 1e9) for link in (450, 50)
    }
    for link, (forward, backward) in hidden.items():
        print(
            f"causal, {given.tflops:.0f} TFLOP/s, {link} a direction: hidden from {forward:,.0f} "
            f"tokens per device on, backward {backward:,.0f}"
        )
    norms = {str(devices): layer.norms(devices, causal=True) for devices in given.devices}
    for devices, one in norms.items():
        print(
            f"causal, {devices} devices, a key's norm: {one['sent_bytes']} bytes sent, "
            f"{one['share_of_block']:.2%} of a block; made again, {one['made_flops']:,} "
            f"operations and {one['made_memory_bytes']:,} bytes of memory traffic"
        )
    from rbf_jax import environment

    result = {
        "command": command_line("ring_traffic", argv),
        **environment.describe(),
        "layer": dataclasses.asdict(layer),
        "tflops": given.tflops,
        "hidden_above_tokens": hidden,
        "causal_key_norms": norms,
        "rows": rows,
    }
    write_text(Path(given.out), json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
