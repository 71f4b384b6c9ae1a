"""Calls of `decode.attend` by the kernels, held to what "xla" makes of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rbf_jax.ops.decode import api as decode
from rbf_jax.ops.decode.cache import KeysValues

TOLERANCES = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and rules; each row of the batch has so many tokens before and after the step."""

    name: str
    starts: tuple[int, ...] = (66, 19)
    T: int = 1
    counts: tuple[int, ...] | None = None  # new tokens of each row; T of them where None
    N: int = 4
    K: int = 2
    H: int = 16
    R: int = 0
    slots: int = 67  # C
    window: int | None = None
    alibi: bool = False
    sink: bool = False  # at the origin
    sink_logits: tuple[float, ...] | None = None
    dtype: str = "float32"

    @property
    def B(self):
        return len(self.starts)

    @property
    def lengths(self):
        return tuple(np.add(self.starts, self.counts or self.T))

    def options(self):
        """All but the arrays of `arrays`."""
        slopes = np.linspace(0, 0.2, self.N, dtype=np.float32) if self.alibi else None
        sinks = None if self.sink_logits is None else np.array(self.sink_logits, np.float32)
        return {
            "num_registers": self.R,
            "window": self.window,
            "alibi_slopes": slopes,
            "origin_sink": self.sink,
            "sink_logits": sinks,
            "gamma": np.linspace(0.1, 0.4, self.N, dtype=np.float32),
            "key_norm_weight": np.linspace(1.1, -0.2, self.N, dtype=np.float32),
        }

    def arrays(self, unseen=0.0):
        """Query, cache, starts, lengths; slots that no query sees hold `unseen`."""
        random = np.random.default_rng(len(self.name))
        shape = self.B, self.K, self.R + self.slots, self.H

        def normal(*shape):
            return random.standard_normal(shape).astype(self.dtype)

        query, key, value = normal(self.B, self.T, self.N, self.H), normal(*shape), normal(*shape)
        # Norms that are not those of the keys: they are read, not made again.
        norms = np.square(key.astype(np.float32)).sum(-1)
        norms *= random.uniform(0.5, 1.5, norms.shape).astype(np.float32)
        for array in (key, value, norms):
            np.moveaxis(array, 1, 2)[~self.seen()] = unseen
        places = np.array(self.starts, np.int32), np.array(self.lengths, np.int32)
        return jax.tree.map(jnp.asarray, (query, KeysValues(key, value, norms), *places))

    def seen(self):
        """Which slots any query of a row sees, (B, S)."""
        last = np.array(self.lengths)[:, None] - 1
        positions = last - (last - np.arange(self.slots)) % self.slots
        starts = np.array(self.starts)[:, None]
        seen = (positions >= 0) & (positions < starts + self.T)
        if self.window is not None:
            seen &= positions >= starts - self.window
        return np.pad(seen, ((0, 0), (self.R, 0)), constant_values=True)


def attend(case, implementation, arrays):
    """Output and logsumexp."""

    def call(*arrays):
        return decode.attend(*arrays, **case.options(), implementation=implementation)

    return jax.jit(call)(*arrays)


def assert_close(case, got, want):
    """Outputs by the dtype's tolerance, the logsumexp by that of float32."""
    assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in want]
    for x, y, dtype in zip(got, want, (case.dtype, "float32")):
        tolerance = TOLERANCES[dtype]
        x, y = (np.asarray(a, np.float32) for a in (x, y))
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def check(case):
    """The kernels' results are those of "xla", and nothing that is not seen is read."""
    want = attend(case, "xla", case.arrays())
    got = attend(case, "triton", case.arrays(unseen=jnp.nan))
    assert_close(case, got, want)


CASES = [
    Case("step"),
    Case("bfloat16", dtype="bfloat16", H=64),
    Case("float16", dtype="float16", H=64),
    Case("registers", R=3, starts=(33, 0, 12)),
    Case("registers_alone", R=3, starts=(0, 5), counts=(0, 1)),
    Case("nothing", starts=(0, 5), counts=(0, 0)),
    Case("nothing_but_the_sink", starts=(0, 5), counts=(0, 1), sink=True),
    Case("sink", sink=True, dtype="bfloat16"),
    Case("sink_logits", R=2, sink_logits=(30, -5, 0, 2), starts=(40, 3)),
    Case("nothing_but_sink_logits", starts=(0, 5), counts=(0, 1), sink_logits=(-7, 0, 1, 9)),
    Case("several_tokens", T=5, starts=(30, 0, 7), counts=(5, 2, 0)),
    Case("window", T=3, window=9, starts=(60, 4)),
    Case("window_of_none", window=0, starts=(40, 0)),
    Case("window_and_registers", T=2, window=20, R=17, starts=(60, 3)),
    Case("ring", T=3, window=40, R=2, slots=43, starts=(100, 13, 41), dtype="bfloat16"),
    Case("ring_of_all", slots=37, starts=(100, 36, 73)),
    Case("alibi", T=4, alibi=True, R=2, starts=(50, 0), window=30, slots=40),
    Case("multi_query", T=4, N=8, K=1, dtype="bfloat16"),
    Case("many_rows", T=16, N=6, K=1, sink=True, slots=90, starts=(60, 3)),
    Case("one_slot", slots=1, starts=(0, 7)),
    *(Case(f"H={H}", H=H, R=1, slots=40, starts=(35,)) for H in (1, 24, 80, 100, 256)),
    *(Case(f"H={H}", H=H, dtype="bfloat16", slots=40, starts=(35,)) for H in (24, 128, 200)),
]
EVERYTHING = Case(
    "everything",
    T=2,
    N=4,
    K=2,
    R=3,
    slots=34,
    window=32,
    alibi=True,
    sink_logits=(1, -3, 4, 0),
    starts=(70, 20, 0),
    counts=(2, 1, 0),
)
