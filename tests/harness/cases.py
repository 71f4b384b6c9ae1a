"""The calls that every implementation is tested on, by name."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st


def on_cpu(function):
    """Has a function run on the CPU, where its many small programs take less time to compile."""

    @functools.wraps(function)
    def wrapped(*arguments, **keywords):
        with jax.default_device(jax.devices("cpu")[0]):
            return function(*arguments, **keywords)

    return wrapped


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes, the size of the vectors, and the options of one call.

    `features` names what an implementation may refuse; `options` may hold functions of the shape
    (B, N, T, S), which are called to make arrays.
    """

    name: str
    T: int = 33
    S: int = 33
    B: int = 2
    N: int = 2
    K: int = 2
    H: int = 16
    norm: float = 1.0  # standard deviation of the coordinates of queries and keys
    offset: float = 0.0  # added to the keys' first coordinate
    gamma: float | None = None  # 1/√H where None
    cotangent: float = 1.0  # standard deviation of the output's cotangent
    per_head: bool = False  # γ and λ as arrays, one number per head
    per_head_weight: bool = False  # λ only
    features: frozenset[str] = frozenset()
    options: tuple[tuple[str, Any], ...] = ()

    @on_cpu
    def arrays(self, dtype, seed=0):
        """q, k, v, γ, λ and the cotangents of output and logsumexp."""
        keys = jax.random.split(jax.random.key(seed), 5)
        make = lambda key, *shape: jax.random.normal(key, shape, jnp.float32)  # noqa: E731
        B, T, S, N, K, H = self.B, self.T, self.S, self.N, self.K, self.H
        query = self.norm * make(keys[0], B, T, N, H)
        key = self.norm * make(keys[1], B, S, K, H)
        key = key.at[..., 0].add(self.offset)
        value, dout = make(keys[2], B, S, K, H), make(keys[3], B, T, N, H)
        parameter = np.dtype(np.float64 if dtype == np.float64 else np.float32)
        dout = self.cotangent * dout
        gamma: Any = parameter.type(1 / np.sqrt(H) if self.gamma is None else self.gamma)
        key_norm_weight: Any = parameter.type(1)
        if self.per_head:
            gamma = np.linspace(0.5, 1.5, N, dtype=parameter) / parameter.type(np.sqrt(H))
        if self.per_head or self.per_head_weight:
            key_norm_weight = np.linspace(-0.2, 1, N, dtype=parameter)
        dlogsumexp = make(keys[4], B, T, N)
        cast = [x.astype(dtype) for x in (query, key, value)]
        return *cast, gamma, key_norm_weight, dout.astype(dtype), dlogsumexp

    def resolved_options(self):
        """The options with their arrays made."""
        shape = (self.B, self.N, self.T, self.S)
        return {name: value(*shape) if callable(value) else value for name, value in self.options}


def case(name, features=(), *, T=33, S=33, B=2, N=2, K=2, H=16, **rest) -> Case:
    """Builds a Case: keyword arguments that are no field of it are options of the call."""
    fields = {field.name for field in dataclasses.fields(Case)}
    own = {key: rest.pop(key) for key in list(rest) if key in fields}
    return Case(
        name,
        T,
        S,
        B,
        N,
        K,
        H,
        features=frozenset(features),
        options=tuple(sorted(rest.items())),
        **own,
    )


def mask_over(*axes):
    """A random mask that is full along `axes` (of B, N, T, S) and broadcast along the others."""

    def make(*shape):
        kept = tuple(n if axis in axes else 1 for axis, n in zip("BNTS", shape, strict=True))
        return np.random.default_rng(1).random(kept) < 0.7

    return make


def _some_rows_masked(B, N, T, S):
    mask = np.random.default_rng(2).random((B, N, T, S)) < 0.5
    mask[:, :, 3] = False
    mask[-1, 0] = False
    return mask


def _segments(length_axis):
    def make(B, N, T, S):
        length = {"T": T, "S": S}[length_axis]
        return np.stack([np.arange(length) * (3 + b) // length for b in range(B)])

    return make


def sinks(*logits):
    """Logits of sinks, one per head; given one number, the same for all heads."""
    array = np.array(logits if len(logits) > 1 else logits[0], np.float32)
    return lambda *_: array


SEGMENTS = {"query_segment_ids": _segments("T"), "key_value_segment_ids": _segments("S")}
# All options at once, but for those that exclude each other.
EVERYTHING = {
    "T": 40,
    "S": 52,
    "N": 4,
    "per_head": True,
    "is_causal": True,
    "local_window_size": (20, 0),
    "mask": mask_over("B", "T", "S"),
    "alibi_slopes": lambda B, N, *_: 0.1 * np.arange(N),
    "query_seq_lengths": lambda *_: np.array([40, 31], np.int32),
    "key_value_seq_lengths": lambda *_: np.array([29, 52], np.int32),
    **SEGMENTS,
}

CASES = [
    case("full", T=17, S=23),
    case("one_query", T=1, S=19),
    case("one_key", T=19, S=1),
    case("one_of_each", T=1, S=1),
    case("causal", is_causal=True),
    case("causal_more_keys", T=13, S=29, is_causal=True),
    case("causal_more_queries", T=29, S=13, is_causal=True),
    case("prime_lengths", T=127, S=131, is_causal=True),
    case("several_blocks", T=523, S=1031, B=1, is_causal=True),
    case("several_blocks_full", T=300, S=520, B=1, K=1),
    case("unbatched_size", B=1, T=16, S=16, H=24),
    case("grouped", N=4, K=2, is_causal=True),
    case("multi_query", N=4, K=1, per_head=True, is_causal=True, features=["array_gamma"]),
    case("per_head", per_head=True, features=["array_gamma"]),
    case("per_head_weight", N=4, K=2, per_head_weight=True),
    case("window", is_causal=True, local_window_size=5),
    case("window_two_sided", ["two_sided_window"], local_window_size=(3, 2)),
    case("window_blocks", ["two_sided_window"], T=600, S=600, B=1, local_window_size=(40, 9)),
    case("window_zero", is_causal=True, local_window_size=0),
    case("mask_BNTS", ["mask"], mask=mask_over("B", "N", "T", "S")),
    case("mask_TS", ["mask"], mask=mask_over("T", "S"), is_causal=True),
    case("mask_BS", ["mask"], mask=mask_over("B", "S"), T=300, S=520, B=2),
    case("mask_NT", ["mask"], mask=mask_over("N", "T"), N=4),
    case("mask_none", ["mask"], mask=mask_over(), N=4),
    case("mask_rows", ["mask"], mask=_some_rows_masked),
    case(
        "lengths",
        ["lengths"],
        query_seq_lengths=lambda B, *_: np.array([7, 33], np.int32),
        key_value_seq_lengths=lambda B, *_: np.array([33, 11], np.int32),
    ),
    case(
        "lengths_zero",
        ["lengths"],
        T=300,
        S=600,
        key_value_seq_lengths=lambda B, *_: np.array([0, 520], np.int32),
    ),
    case("segments", ["segments"], **SEGMENTS),
    case("segments_causal", ["segments"], T=300, S=300, is_causal=True, **SEGMENTS),
    case("alibi", ["alibi"], is_causal=True, alibi_slopes=lambda B, N, *_: 2.0 ** -np.arange(N)),
    case("sink", ["sink"], origin_sink=True, is_causal=True),
    case("sink_masked", ["sink", "mask"], origin_sink=True, mask=_some_rows_masked),
    case(
        "everything",
        ["array_gamma", "mask", "segments", "lengths", "alibi", "sink"],
        origin_sink=True,
        **EVERYTHING,
    ),
    case(
        "unnormalized",
        ["unnormalized", "array_gamma"],
        N=4,
        per_head=True,
        is_causal=True,
        normalize=False,
    ),
    case(
        "unnormalized_rows",
        ["unnormalized", "array_gamma", "mask"],
        mask=_some_rows_masked,
        normalize=False,
    ),
    case(
        "unnormalized_everything",
        ["unnormalized", "array_gamma", "mask", "segments", "lengths", "alibi"],
        normalize=False,
        **EVERYTHING,
    ),
    case("unnormalized_far_keys", ["unnormalized", "array_gamma"], offset=60.0, normalize=False),
    # Every weight exp(−γ‖q−k‖²) underflows float32 unless the row is measured from its maximum.
    case("far_keys", offset=60.0),
    case("far_keys_causal", offset=60.0, is_causal=True, T=300, S=300),
    case("huge_norms", norm=1e4 / 4),  # ‖k‖ ≈ 1e4 at H = 16
    case("small_norms", norm=1e-4),
    case("small_norms_large_gamma", norm=0.25, gamma=10.0),
    case("large_cotangent", cotangent=300.0),
    case("equal_keys", norm=0.0, offset=1.0),
    case("sink_logits", ["sink_logits"], N=4, K=2, is_causal=True, sink_logits=sinks(30, -5, 0, 2)),
    case(  # some rows see nothing but the sink
        "sink_logits_masked",
        ["sink_logits", "mask", "lengths"],
        sink_logits=sinks(-20, 3),
        mask=_some_rows_masked,
        query_seq_lengths=lambda *_: np.array([33, 20], np.int32),
        key_value_seq_lengths=lambda *_: np.array([9, 0], np.int32),
    ),
    case("sink_logits_scalar", ["sink_logits"], sink_logits=sinks(1.5), offset=2.0),
    case(
        "global_keys",
        ["global_keys"],
        T=600,
        S=600,
        B=1,
        K=1,
        is_causal=True,
        local_window_size=(5, 0),
        num_global_keys=3,
    ),
    case("global_keys_none_ahead", ["global_keys"], num_global_keys=6, local_window_size=(3, 0)),
    case(
        "global_keys_segments",
        ["global_keys", "segments"],
        is_causal=True,
        num_global_keys=3,
        **SEGMENTS,
    ),
    case(
        "global_keys_alibi",
        ["global_keys", "alibi"],
        T=29,
        num_global_keys=4,
        alibi_slopes=lambda B, N, *_: 2.0 ** -np.arange(N),
    ),
    case(  # more of them than a block of keys has, where blocks are small
        "global_keys_two_sided",
        ["global_keys", "two_sided_window"],
        T=50,
        S=70,
        B=1,
        num_global_keys=19,
        local_window_size=(3, 2),
    ),
    case(
        "global_keys_lengths",
        ["global_keys", "lengths"],
        num_global_keys=5,
        is_causal=True,
        local_window_size=4,
        query_seq_lengths=lambda *_: np.array([30, 33], np.int32),
        key_value_seq_lengths=lambda *_: np.array([3, 31], np.int32),
    ),
    case(
        "global_keys_everything",
        ["array_gamma", "mask", "segments", "lengths", "alibi", "sink_logits", "global_keys"],
        num_global_keys=7,
        sink_logits=sinks(-5, 1, 0.25, 6),
        **EVERYTHING,
    ),
    case(
        "unnormalized_global_keys",
        ["unnormalized", "array_gamma", "alibi", "global_keys"],
        num_global_keys=2,
        is_causal=True,
        local_window_size=6,
        alibi_slopes=lambda B, N, *_: 0.1 * np.arange(N),
        normalize=False,
    ),
]
BY_NAME = {c.name: c for c in CASES}

# The cases run in bfloat16 and float16 beside float32.
IN_16_BITS = frozenset(
    {
        "full",
        "causal",
        "several_blocks",
        "multi_query",
        "window_two_sided",
        "mask_rows",
        "lengths",
        "everything",
        "unnormalized",
        "unnormalized_everything",
        "far_keys",
        "huge_norms",
        "small_norms_large_gamma",
        "large_cotangent",
        "sink_logits",
        "global_keys_everything",
    }
)


@st.composite
def drawn_case(draw):
    """Any shapes and options together; T and S up to several small blocks."""
    B, K, H = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 8]))
    N = K * draw(st.sampled_from([1, 3]))
    T, S = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    options: dict = {"is_causal": draw(st.booleans())}
    sink = draw(st.sampled_from([None, "origin", "scalar", "per_head"]))
    options["origin_sink"] = sink == "origin"
    if sink in ("scalar", "per_head"):
        shape = (N,) if sink == "per_head" else ()
        options["sink_logits"] = np.asarray(random.normal(0, 5, shape), np.float32)
    if draw(st.booleans()):
        options["num_global_keys"] = draw(st.integers(0, S))
    if draw(st.booleans()):
        options["local_window_size"] = (draw(st.integers(0, 40)), draw(st.integers(0, 40)))
    if draw(st.booleans()):
        axes = [n if draw(st.booleans()) else 1 for n in (B, N, T, S)]
        options["mask"] = random.random(axes) < 0.6
    if draw(st.booleans()):
        options["query_seq_lengths"] = random.integers(0, T + 1, B)
        options["key_value_seq_lengths"] = random.integers(0, S + 1, B)
    if draw(st.booleans()):
        options["query_segment_ids"] = random.integers(0, 3, (B, T))
        options["key_value_segment_ids"] = random.integers(0, 3, (B, S))
    if draw(st.booleans()):
        options["alibi_slopes"] = random.random(N).astype(np.float32)
    drawn = case(
        "drawn", T=T, S=S, B=B, N=N, K=K, H=H, per_head=draw(st.booleans()), norm=draw(NORMS)
    )
    return dataclasses.replace(drawn, options=tuple((k, Constant(v)) for k, v in options.items()))


NORMS = st.sampled_from([1e-2, 1.0, 30.0])


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """An option's value, hashable by identity, as `Case` wants it."""

    value: object

    def __call__(self, *_):
        return self.value
