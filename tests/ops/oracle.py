"""What the operation must compute, in NumPy: the truth in float64, and a measure of what is good.

`oracle` is the truth. `plain` is the quadratic formula as one would write it, every step rounded
to the input's own dtype: an implementation may err at most twice as much as it.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

# In nats: the largest bound of a row's logits that weights are measured from.
LARGEST_BOUND = 2.0**13 * np.log(2)
# In nats: how far below the bound they are measured from.
HEADROOM = 60 * np.log(2)


class Results(NamedTuple):
    """Output, logsumexp and the gradients for given cotangents of both."""

    out: np.ndarray
    logsumexp: np.ndarray
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    gamma: np.ndarray
    key_norm_weight: np.ndarray


def allowed(shape, options):
    """Who may attend to whom, (B, N, T, S)."""
    _, _, T, S = shape
    i, j = np.arange(T)[:, None], np.arange(S)[None, :]
    result = np.ones(shape, bool)
    if options.get("mask") is not None:
        result &= np.asarray(options["mask"])
    if options.get("is_causal"):
        result &= j <= i
    if options.get("local_window_size") is not None:
        window = options["local_window_size"]
        left, right = (window, window) if isinstance(window, int) else window
        result &= (i - left <= j) & (j <= i + right)
    if options.get("query_seq_lengths") is not None:
        result &= i < np.asarray(options["query_seq_lengths"])[:, None, None, None]
    if options.get("key_value_seq_lengths") is not None:
        result &= j < np.asarray(options["key_value_seq_lengths"])[:, None, None, None]
    if options.get("query_segment_ids") is not None:
        rows = np.asarray(options["query_segment_ids"])[:, None, :, None]
        result &= rows == np.asarray(options["key_value_segment_ids"])[:, None, None, :]
    return result


def oracle(*arrays, **options) -> tuple[Results, Results, Results, Results]:
    """Everything in float64.

    Args:
      *arrays: query, key, value, γ, λ and the cotangents of output and logsumexp.
      **options: of the call.

    Returns:
      The results, and for each of them the sum of the absolute values of the terms it is made of:
      times the machine epsilon, that is what any order of summation may lose. Then what an output
      that is off by ε of its terms does to each, in units of ε: where one weight is all, `plain`
      has that weight and the output exactly, but not an implementation that rounds its weights
      while they are measured from a bound, which also rounds their logarithm as a number of the
      size of HEADROOM. Only rows whose bound is small are counted. Then what the rounding of the
      output to its dtype does to a backward pass that knows only that.
    """
    return _formula(np.float64, lambda x: x, *arrays, **options)


def plain(*arrays, **options) -> Results:
    """The same formula with every step rounded to the query's dtype; products of matrices once."""
    dtype = jnp.dtype(arrays[0].dtype)
    hold = np.float64 if dtype == np.float64 else np.float32

    def rounded(x):
        return x.astype(dtype).astype(hold)

    with np.errstate(over="ignore", invalid="ignore"):
        results, *_ = _formula(hold, rounded, *arrays, **options)
        # The heads of a group were summed since.
        results = results._replace(key=rounded(results.key), value=rounded(results.value))
    return Results(*(np.asarray(x, np.float64) for x in results))


def _formula(dtype, rounded, query, key, value, gamma, key_norm_weight, dout, dlse, **options):
    r = rounded
    q, k, v, do, dl = (np.asarray(x, dtype) for x in (query, key, value, dout, dlse))
    N, K = q.shape[2], k.shape[2]
    g = r(np.zeros((N, 1, 1), dtype) + np.asarray(gamma, dtype).reshape(-1, 1, 1))
    lam = r(np.zeros((N, 1, 1), dtype) + np.asarray(key_norm_weight, dtype).reshape(-1, 1, 1))
    q, do = q.transpose(0, 2, 1, 3), do.transpose(0, 2, 1, 3)  # B N T H
    k, v = (np.repeat(x, N // K, axis=2).transpose(0, 2, 1, 3) for x in (k, v))  # B N S H
    kT, vT = k.swapaxes(-1, -2), v.swapaxes(-1, -2)
    dl = r(dl.transpose(0, 2, 1)[..., None])
    T, S = q.shape[2], k.shape[2]

    products = r(q @ kT)
    norms = r((k * k).sum(-1))[:, :, None, :]
    slopes = np.asarray(options.get("alibi_slopes", np.zeros(N)), dtype)[:, None, None]
    bias = -r(slopes) * np.abs(np.arange(T)[:, None] - np.arange(S)[None, :]).astype(dtype)
    logits = r(r(r(2 * g * products) - r(lam * g * norms)) + r(bias))
    logits = np.where(allowed((*q.shape[:2], T, S), options), logits, -np.inf)
    sink = 0.0 if options.get("origin_sink") else -np.inf
    maximum = np.maximum(logits.max(-1, keepdims=True), sink)
    maximum = np.where(np.isneginf(maximum), 0, maximum).astype(dtype)
    weights = r(np.exp(r(logits - maximum)))
    total = r(weights.sum(-1, keepdims=True) + np.exp(sink - maximum).astype(dtype))
    with np.errstate(divide="ignore"):
        lse = r(maximum + r(np.log(total)))
    p = r(weights / np.where(total == 0, 1, total))
    pT = p.swapaxes(-1, -2)
    out = r(p @ v)

    dp = r(do @ vT)
    ds = r(p * r(r(dp - r((p * dp).sum(-1, keepdims=True))) + dl))
    dsT, columns = ds.swapaxes(-1, -2), r(ds.sum(-2))[..., None]
    results = (
        out,
        lse,
        r(2 * g * r(ds @ k)),
        r(r(2 * g * r(dsT @ q)) - r(2 * g * lam * r(columns * k))),
        r(pT @ do),
        r((ds * r(2 * products - lam * norms)).sum((0, 2, 3))),
        r(-(ds * r(g * norms)).sum((0, 2, 3))),
    )

    # The same sums over absolute values. Errors of the logits l move the weights too: to first
    # order by p_j (e_j − Σ_i p_i e_i), which is nothing where one weight is all.
    abs_products = np.abs(q) @ np.abs(kT)
    abs_logits = 2 * g * abs_products + np.abs(lam) * g * norms - bias
    mean_logit = (p * abs_logits).sum(-1, keepdims=True)
    moved = abs_logits * (1 - p) + np.maximum(mean_logit - p * abs_logits, 0)
    # A backward pass that keeps the logsumexp only feels its rounding: ε|lse|, or all of what the
    # other keys add to the largest logit where that is less, and nothing where one weight is all.
    epsilon = np.finfo(np.float64 if query.dtype == np.float64 else np.float32).eps
    seen = np.where(total == 0, 0, lse)
    moved = moved + np.minimum(np.abs(seen), np.abs(seen - maximum) / epsilon)
    abs_p = p * (1 + moved)
    # Weights below the smallest normal number may vanish.
    smallest = np.finfo(np.float64 if query.dtype == np.float64 else np.float32).tiny / epsilon
    abs_p = np.where(np.isneginf(logits), 0, np.maximum(abs_p, smallest))
    abs_dp = np.abs(do) @ np.abs(vT)
    abs_ds = abs_p * (abs_dp + np.abs(dl)) + p * (abs_p * abs_dp).sum(-1, keepdims=True)

    def terms(abs_ds):
        """Sums of the absolute values of the terms of dq, dk, dγ and dλ."""
        by_key = abs_ds.swapaxes(-1, -2)
        return {
            "query": 2 * g * (abs_ds @ np.abs(k)),
            "key": 2
            * g
            * (by_key @ np.abs(q) + np.abs(lam) * by_key.sum(-1)[..., None] * np.abs(k)),
            "gamma": (abs_ds * (2 * abs_products + np.abs(lam) * norms)).sum((0, 2, 3)),
            "key_norm_weight": (abs_ds * g * norms).sum((0, 2, 3)),
        }

    scales = Results(
        out=abs_p @ np.abs(v),
        logsumexp=mean_logit + np.abs(seen),
        value=abs_p.swapaxes(-1, -2) @ np.abs(do),
        **terms(abs_ds),
    )

    def of_output(moved_out, weights):
        """What an output that is off by `moved_out` does to the gradients."""
        moved_delta = (moved_out * np.abs(do)).sum(-1, keepdims=True)
        return Results(
            out=np.zeros_like(out),
            logsumexp=np.zeros_like(lse),
            value=np.zeros_like(v),
            **terms(weights * moved_delta),
        )

    with np.errstate(divide="ignore", invalid="ignore"):
        bounds = g * (q * q).sum(-1, keepdims=True) / lam
    rounded_p = np.where((lam > 0) & (bounds <= LARGEST_BOUND), p, 0)
    rounded_out = rounded_p @ np.abs(v)
    # Logits that are measured from a bound less HEADROOM are rounded as numbers of that size are.
    in_float32 = np.finfo(np.float32).eps / float(jnp.finfo(query.dtype).eps)
    rounded_lse = np.where(rounded_p.any(-1, keepdims=True), HEADROOM * in_float32, 0)
    rounding = of_output(rounded_out, rounded_p)._replace(out=rounded_out, logsumexp=rounded_lse)
    with np.errstate(over="ignore", invalid="ignore"):
        kept = np.abs(out - out.astype(query.dtype).astype(dtype))
    kept = of_output(np.where(np.isfinite(kept), kept, 0), p)
    heads = K, np.ndim(gamma), np.ndim(key_norm_weight)
    return tuple(_public(heads, *x) for x in (results, scales, rounding, kept))


def _public(heads, out, lse, dq, dk, dv, dgamma, dlambda) -> Results:
    """Heads after lengths, heads of a group summed, numbers shared by all heads summed."""
    K, gamma_axes, lambda_axes = heads

    def ungroup(x):  # B N S H to B S K H
        B, N, S, H = x.shape
        return x.transpose(0, 2, 1, 3).reshape(B, S, K, N // K, H).sum(3)

    return Results(
        out.transpose(0, 2, 1, 3),
        lse[..., 0].transpose(0, 2, 1),
        dq.transpose(0, 2, 1, 3),
        ungroup(dk),
        ungroup(dv),
        dgamma if gamma_axes else dgamma.sum(),
        dlambda if lambda_axes else dlambda.sum(),
    )
