"""The bound that every implementation must keep, and what each refuses."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rbf_jax import rbf_attention
from rbf_jax.ops import cudnn
from rbf_jax.ops.types import Inputs, Options
from tests.ops import oracle as oracle_lib
from tests.ops.cases import Case, on_cpu


@dataclasses.dataclass(frozen=True)
class Subject:
    """An implementation under test.

    Attributes:
      name: as the tables call it.
      attend: called like `rbf_attention`, without `implementation`.
      refuses: features (see `Case`) that must raise NotImplementedError.
      inaccurate: names of cases that it takes and does not do well enough; docs/implementations.md
        says so.
      dtypes: the names of the dtypes it takes.
      logsumexp: whether it returns one.
      gamma_gradient: whether γ is differentiable.
      bounded: names of the dtypes in which weights are measured from a bound instead of the row's
        largest logit, so that a weight of 1 is rounded too.
      prepare: called between compiling a test and running it.
    """

    name: str
    attend: Callable
    refuses: frozenset[str] = frozenset()
    inaccurate: frozenset[str] = frozenset()
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16", "float64")
    logsumexp: bool = True
    gamma_gradient: bool = True
    bounded: tuple[str, ...] = ()
    prepare: Callable[[], None] = lambda: None


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
    prepare=poison if jax.default_backend() == "gpu" else lambda: None,
)

CUDNN_REFUSES = frozenset(
    {"array_gamma", "mask", "lengths", "segments", "alibi", "sink", "two_sided_window"}
)


def _cudnn_arithmetic(query, key, value, *, gamma, key_norm_weight, **options):
    """cuDNN's augmented heads through jax.nn's "xla": the same sums without an NVIDIA GPU.

    The 16-bit heads are multiplied as float32, exactly, as a GPU does with float32 accumulators.
    """
    per_head = [jnp.broadcast_to(jnp.float32(x), query.shape[2]) for x in (gamma, key_norm_weight)]
    inputs = Inputs(query, key, value, *per_head)
    shared = Options(shared_key_norm_weight=np.ndim(key_norm_weight) == 0)
    heads = (x.astype(jnp.float32) for x in cudnn.augment(inputs, shared))
    with jax.default_matmul_precision("highest"):
        out = jax.nn.dot_product_attention(
            *heads, scale=2 * float(gamma), implementation="xla", **options
        )
    return cudnn.unpad(out, inputs).astype(query.dtype)


_CUDNN = {
    "refuses": CUDNN_REFUSES,
    "dtypes": ("bfloat16", "float16"),
    "logsumexp": False,
    "gamma_gradient": False,
}


def _subjects():
    yield Subject("reference", functools.partial(rbf_attention, implementation="reference"))
    yield Subject("xla", functools.partial(rbf_attention, implementation="xla"))
    yield Subject("cudnn arithmetic", _cudnn_arithmetic, **_CUDNN)
    if jax.default_backend() == "gpu":
        yield TRITON
        yield Subject(
            "cudnn",
            functools.partial(rbf_attention, implementation="cudnn"),
            inaccurate=frozenset({"huge_norms"}),
            **_CUDNN,
        )


SUBJECTS = {subject.name: subject for subject in _subjects()}


def run(subject: Subject, case: Case, dtype, seed=0) -> oracle_lib.Results:
    """The output, the logsumexp and all gradients; NaN where the subject has none."""
    q, k, v, gamma, key_norm_weight, dout, dlogsumexp = case.arrays(dtype, seed)
    options = case.resolved_options()

    @jax.jit
    def everything(q, k, v, gamma, key_norm_weight, dout, dlogsumexp):
        def attend(q, k, v, gamma, key_norm_weight):
            extra = {"return_residual": True} if subject.logsumexp else {}
            return subject.attend(
                q, k, v, gamma=gamma, key_norm_weight=key_norm_weight, **extra, **options
            )

        if not subject.gamma_gradient:
            fixed = case.arrays(dtype, seed)[3]
            out, vjp = jax.vjp(lambda *a: attend(*a[:3], fixed, a[3]), q, k, v, key_norm_weight)
            dq, dk, dv, dweight = vjp(dout)
            return out, jnp.nan, dq, dk, dv, jnp.nan, dweight
        (out, logsumexp), vjp = jax.vjp(attend, q, k, v, gamma, key_norm_weight)
        dlogsumexp = dlogsumexp.astype(logsumexp.dtype)
        return out, logsumexp, *vjp((dout, dlogsumexp))

    if not subject.logsumexp:
        dlogsumexp = jnp.zeros_like(dlogsumexp)
    arrays = q, k, v, gamma, key_norm_weight, dout, dlogsumexp
    compiled = everything.lower(*arrays).compile()
    subject.prepare()
    results = compiled(*arrays)
    with np.errstate(invalid="ignore"):  # NaN is for the caller to find
        return oracle_lib.Results(*(np.asarray(x, np.float64) for x in results))


@functools.lru_cache(maxsize=512)
@on_cpu
def expected(case: Case, dtype_name: str, with_logsumexp: bool, seed: int):
    """The oracle's results, scales and roundings, and the plain formula's results, for a case."""
    arrays = list(case.arrays(jnp.dtype(dtype_name), seed))
    if not with_logsumexp:
        arrays[-1] = jnp.zeros_like(arrays[-1])
    options = case.resolved_options()
    return (*oracle_lib.oracle(*arrays, **options), oracle_lib.plain(*arrays, **options))


def violations(subject: Subject, case: Case, dtype_name: str, seed=0) -> list[str]:
    """Says where the subject errs more than twice as much as the plain formula in its dtype.

    Errors are measured by the Euclidean norm and by the largest element. To twice the plain
    formula's error comes what reordering sums may cost in the accumulation dtype, and what rounding
    the weights costs where the subject does that on another scale than the plain formula.
    """
    got = run(subject, case, jnp.dtype(dtype_name), seed)
    want = expected(case, dtype_name, subject.logsumexp, seed)[0]
    found = []
    for name in want._fields:
        if name == "logsumexp" and not subject.logsumexp:
            continue
        if name == "gamma" and not subject.gamma_gradient:
            continue
        a, b = getattr(got, name), getattr(want, name)
        if a.shape != b.shape:
            found.append(f"{name}: shape {a.shape} instead of {b.shape}")
            continue
        nothing = np.isneginf(b)
        if not (np.array_equal(np.isneginf(a), nothing) and np.isfinite(a[~nothing]).all()):
            found.append(f"{name}: not finite where it should be, or the reverse")
            continue
        # One number's error may be small by luck: for γ and λ the worst of several draws counts.
        draws = range(seed, seed + (8 if name in ("gamma", "key_norm_weight") else 1))
        for measure in (np.linalg.norm, np.max):
            error = measure(np.abs(np.where(nothing, 0, a - np.where(nothing, 0, b))))
            bounds = []
            for draw in draws:
                bounds.append(_bound(subject, case, dtype_name, draw, name, measure))
                if error <= bounds[-1]:
                    break
            else:
                bound = max(bounds)
                found.append(
                    f"{name}: {measure.__name__} of the error {error:.3g} exceeds {bound:.3g} "
                    f"(result {measure(np.abs(np.where(nothing, 0, b))):.3g})"
                )
    return found


def _bound(subject, case, dtype_name, seed, name, measure) -> float:
    results = expected(case, dtype_name, subject.logsumexp, seed)
    want, scale, rounding, plain = (getattr(x, name) for x in results)
    accumulation = np.float64 if dtype_name == "float64" else np.float32
    nothing = np.isneginf(want)
    error = measure(np.abs(np.where(nothing, 0, plain - np.where(nothing, 0, want))))
    if not np.isfinite(error):  # the plain formula overflows: what its dtype's rounding would cost
        error = float(jnp.finfo(dtype_name).eps) * measure(np.where(nothing, 0, np.abs(want)))
    bound = 2 * error + 2 * float(np.finfo(accumulation).eps) * measure(scale)
    if dtype_name in subject.bounded:
        bound += float(jnp.finfo(dtype_name).eps) * measure(rounding)
    return bound
