"""The bound that every implementation must keep, and what each refuses."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rbf_jax import rbf_attention
from rbf_jax.ops.gpu.mosaic import config as tiles
from tests.harness import oracle as oracle_lib
from tests.harness.cases import Case, on_cpu

IN_FLOAT32 = ("logsumexp", "gamma", "key_norm_weight", "sink_logits")  # whatever the dtype
FEW = 1000


@dataclasses.dataclass(frozen=True)
class Subject:
    """An implementation under test.

    Attributes:
      name: as the tables call it.
      attend: called like `rbf_attention`, without `implementation`.
      refuses: features (see `Case`) that must raise NotImplementedError.
      odd_lengths: whether it takes any length; else even ones, and odd T = S if causal.
      key_norm_weight: the one λ that it takes, known when tracing; replaces that of a case.
      dtypes: the names of the dtypes it takes.
      logsumexp: whether it returns one.
      gamma_gradient: whether γ is differentiable.
      keeps_output: whether its backward pass makes what it needs of the weights from the output.
      bounded: names of the dtypes in which weights are measured from a bound instead of the row's
        largest logit, so that a weight of 1 is rounded too.
      prepare: called between compiling a program and the run whose results count.
    """

    name: str
    attend: Callable
    refuses: frozenset[str] = frozenset()
    odd_lengths: bool = True
    key_norm_weight: float | None = None
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16", "float64")
    logsumexp: bool = True
    gamma_gradient: bool = True
    keeps_output: bool = True
    bounded: tuple[str, ...] = ()
    prepare: Callable[[], None] | None = None

    def takes(self, case: Case) -> bool:
        """Whether it supports the case."""
        square = dict(case.options).get("is_causal", False) and case.T == case.S
        even = square or not (case.T % 2 or case.S % 2)
        return not case.features & self.refuses and (self.odd_lengths or even)

    def lacks(self, name: str) -> bool:
        """Whether it has no such field of `Results`."""
        has = {
            "logsumexp": self.logsumexp,
            "gamma": self.gamma_gradient,
            "key_norm_weight": self.key_norm_weight is None,
        }
        return not has.get(name, True)


def poison():
    """Fills free memory of the GPU with what is NaN in every dtype, so that outputs start as NaN.

    Large and small pieces, since memory is given out from the piece that fits best.
    """
    pieces = [jnp.full(2**n, 0xFF, jnp.uint8) for n in (29, 26, 22, 18, 14, 10) for _ in range(4)]
    jax.block_until_ready(pieces)
    for piece in pieces:
        piece.delete()


TRITON = Subject(
    "triton",
    functools.partial(rbf_attention, implementation="triton"),
    dtypes=("float32", "bfloat16", "float16"),
    bounded=("bfloat16",),
    prepare=poison if jax.default_backend() == "gpu" else None,
)

MOSAIC = Subject(
    "mosaic",
    functools.partial(rbf_attention, implementation="mosaic"),
    refuses=frozenset({"mask", "segments", "global_keys"}),
    dtypes=("bfloat16", "float16"),
    bounded=("bfloat16",),
    prepare=TRITON.prepare,
)


def mosaic_tiles(head_dim, tiles_per_cta, deterministic):
    """Sets tiles of the forward kernel, where they fit, and which backward kernels run."""
    H = min(size for size in tiles.HEAD_DIMS if size >= head_dim)
    forward = tiles.choose(H, False, 1, 1)
    if H <= 128:
        forward = dataclasses.replace(forward, tiles_per_cta=tiles_per_cta)
    return tiles.use_tiles(forward, tiles.choose_backward(H, deterministic=deterministic))


CUDNN = Subject(
    "cudnn",
    functools.partial(rbf_attention, implementation="cudnn"),
    refuses=frozenset(
        {
            "array_gamma",
            "mask",
            "lengths",
            "segments",
            "alibi",
            "sink",
            "sink_logits",
            "global_keys",
            "two_sided_window",
            "unnormalized",
        }
    ),
    dtypes=("bfloat16", "float16"),
    logsumexp=False,
    gamma_gradient=False,
    odd_lengths=False,
    key_norm_weight=0.0,
)


def _subjects():
    reference = functools.partial(rbf_attention, implementation="reference")
    yield Subject("reference", reference, keeps_output=False)
    yield Subject("xla", functools.partial(rbf_attention, implementation="xla"))
    if jax.default_backend() == "gpu":
        yield TRITON
        if jax.devices()[0].compute_capability == "9.0":
            yield MOSAIC
        yield CUDNN


SUBJECTS = {subject.name: subject for subject in _subjects()}


def program_of(subject: Subject, static: tuple, gamma: float | None, compiler_options=None):
    """Returns what computes the output, the logsumexp and all gradients.

    What the subject or the case lacks is NaN. `static` options are part of the program, and so is
    `gamma` where it is no argument.
    """

    @functools.partial(jax.jit, compiler_options=compiler_options)
    def program(arrays, options):
        query, key, value, gamma_array, key_norm_weight, dout, dlogsumexp = arrays
        options = dict(options)
        given = {"query": query, "key": key, "value": value}
        if gamma is None:
            given["gamma"] = gamma_array
        if subject.key_norm_weight is None:
            given["key_norm_weight"] = key_norm_weight
        if "sink_logits" in options:
            given["sink_logits"] = options.pop("sink_logits")

        def attend(given):
            numbers = {"gamma": gamma, "key_norm_weight": subject.key_norm_weight} | given
            inputs = [numbers.pop(name) for name in ("query", "key", "value")]
            extra = {"return_residual": True} if subject.logsumexp else {}
            return subject.attend(*inputs, **numbers, **extra, **options, **dict(static))

        results, vjp = jax.vjp(attend, given)
        if subject.logsumexp:
            out, logsumexp = results
            (gradients,) = vjp((dout, dlogsumexp.astype(logsumexp.dtype)))
        else:
            out, logsumexp = results, jnp.nan
            (gradients,) = vjp(dout)
        return oracle_lib.Results(
            out,
            logsumexp,
            **{name: gradients.get(name, jnp.nan) for name in oracle_lib.Results._fields[2:]},
        )

    return program


def run(subject: Subject, case: Case, dtype, seed=0, make=program_of) -> oracle_lib.Results:
    """The results of `make(...)` on the arrays of the case."""
    arrays = list(case.arrays(dtype, seed))
    options = case.resolved_options()
    if not subject.logsumexp:
        arrays[-1] = jnp.zeros_like(arrays[-1])
    in_arrays = {key: x for key, x in options.items() if isinstance(x, np.ndarray | jax.Array)}
    static = tuple((key, x) for key, x in options.items() if key not in in_arrays)
    program = make(subject, static, None if subject.gamma_gradient else arrays[3])
    if subject.prepare is not None:  # between compiling and running
        jax.block_until_ready(program(arrays, in_arrays))
        subject.prepare()
    results = program(arrays, in_arrays)
    with np.errstate(invalid="ignore"):  # NaN is for the caller to find
        return oracle_lib.Results(*(np.asarray(x, np.float64) for x in results))


@functools.lru_cache(maxsize=512)
@on_cpu
def expected(case: Case, dtype_name: str, with_logsumexp: bool, seed: int, key_norm_weight=None):
    """The oracle's results, scales and roundings, and the plain formula's results, for a case."""
    arrays = list(case.arrays(jnp.dtype(dtype_name), seed))
    if key_norm_weight is not None:
        arrays[4] = np.float32(key_norm_weight)
    if not with_logsumexp:
        arrays[-1] = jnp.zeros_like(arrays[-1])
    options = case.resolved_options()
    return (*oracle_lib.oracle(*arrays, **options), oracle_lib.plain(*arrays, **options))


def _expected_of(subject: Subject, case: Case, dtype_name: str, seed: int):
    given = (subject.key_norm_weight,) if subject.key_norm_weight is not None else ()
    return expected(case, dtype_name, subject.logsumexp, seed, *given)


def violations(subject: Subject, case: Case, dtype_name: str, seed=0, make=program_of) -> list[str]:
    """Says where the subject errs more than twice as much as the plain formula in its dtype.

    Errors are measured by the Euclidean norm and by the largest element. To twice the plain
    formula's error comes what reordering sums may cost in the accumulation dtype, what the output's
    rounding costs a backward pass that is given nothing else of T×S numbers, and what rounding the
    weights costs where the subject does that on another scale than the plain formula.
    """
    got = run(subject, case, jnp.dtype(dtype_name), seed, make)
    want = _expected_of(subject, case, dtype_name, seed)[0]
    found = []
    for name in want._fields:
        a, b = getattr(got, name), getattr(want, name)
        if subject.lacks(name) or b.size == 0:
            continue
        if a.shape != b.shape:
            found.append(f"{name}: shape {a.shape} instead of {b.shape}")
            continue
        outside = _infinite(b, dtype_name if name not in IN_FLOAT32 else "float32")
        if not np.array_equal(np.where(np.isinf(a), np.sign(a), 0), outside) or np.isnan(a).any():
            found.append(f"{name}: not finite where it should be, or the reverse")
            continue
        # The error of few numbers may be small by luck: then the worst of several draws counts.
        draws = range(seed, seed + (8 if b.size < FEW else 1))
        for measure in (np.linalg.norm, np.max):
            error = measure(_difference(a, b, outside))
            bounds = []
            for draw in draws:
                bounds.append(_bound(subject, case, dtype_name, draw, name, measure))
                if error <= bounds[-1]:
                    break
            else:
                found.append(
                    f"{name}: {measure.__name__} of the error {error:.3g} exceeds "
                    f"{max(bounds):.3g} (result {measure(np.abs(_difference(b, 0, outside))):.3g})"
                )
    return found


def _infinite(want, dtype_name):
    """1 and −1 where a result must be infinite: logsumexps of nothing, and beyond the dtype."""
    return np.where(np.abs(want) > float(jnp.finfo(dtype_name).max), np.sign(want), 0)


def _difference(a, b, outside):
    """|a − b|, and 0 where the result is infinite."""
    with np.errstate(invalid="ignore"):
        return np.where(outside == 0, np.abs(a - b), 0)


def _bound(subject, case, dtype_name, seed, name, measure) -> float:
    results = _expected_of(subject, case, dtype_name, seed)
    want, scale, rounding, kept, plain = (getattr(x, name) for x in results)
    accumulation = np.float64 if dtype_name == "float64" else np.float32
    outside = _infinite(want, dtype_name if name not in IN_FLOAT32 else "float32")
    error = measure(_difference(plain, want, outside))
    if not np.isfinite(error):  # the plain formula overflows: what its dtype's rounding would cost
        error = float(jnp.finfo(dtype_name).eps) * measure(_difference(want, 0, outside))
    bound = 2 * error + 2 * float(np.finfo(accumulation).eps) * measure(scale)
    if subject.keeps_output:
        bound += 2 * measure(kept)
    if dtype_name in subject.bounded:
        bound += float(jnp.finfo(dtype_name).eps) * measure(rounding)
    return bound
