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
    """Output, logsumexp and the gradients for given cotangents of both.

    That of the sinks' logits is empty where none are given.
    """

    out: np.ndarray
    logsumexp: np.ndarray
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    gamma: np.ndarray
    key_norm_weight: np.ndarray
    sink_logits: np.ndarray = np.empty(0)


def allowed(shape, options):
    """Who may attend to whom, (B, N, T, S)."""
    _, _, T, S = shape
    i, j = np.arange(T)[:, None], np.arange(S)[None, :]
    result, causal = np.ones(shape, bool), options.get("is_causal")
    if options.get("local_window_size") is not None:
        window = options["local_window_size"]
        left, right = (window, window) if isinstance(window, int) else window
        result &= (i - left <= j) & (j <= i + right)
        causal = causal or right == 0  # the same rule, from which global keys are not exempt
    if options.get("query_segment_ids") is not None:
        rows = np.asarray(options["query_segment_ids"])[:, None, :, None]
        result &= rows == np.asarray(options["key_value_segment_ids"])[:, None, None, :]
    result |= j < options.get("num_global_keys", 0)
    if options.get("mask") is not None:
        result &= np.asarray(options["mask"])
    if causal:
        result &= j <= i
    if options.get("query_seq_lengths") is not None:
        result &= i < np.asarray(options["query_seq_lengths"])[:, None, None, None]
    if options.get("key_value_seq_lengths") is not None:
        result &= j < np.asarray(options["key_value_seq_lengths"])[:, None, None, None]
    return result


def _distances(T, S, options, dtype):
    """What ALiBi's slopes are multiplied by, (T, S)."""
    distances = np.abs(np.arange(T)[:, None] - np.arange(S)[None, :])
    distances[:, : options.get("num_global_keys", 0)] = 0
    return distances.astype(dtype)


def oracle(*arrays, normalize=True, **options) -> tuple[Results, Results, Results, Results]:
    """Everything in float64.

    Args:
      *arrays: query, key, value, γ, λ and the cotangents of output and logsumexp.
      normalize: of the call.
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
    formula = _formula if normalize else _sums_of_kernels
    return formula(np.float64, lambda x: x, *arrays, **options)


def plain(*arrays, normalize=True, **options) -> Results:
    """The same formula with every step rounded to the query's dtype; products of matrices once."""
    dtype = jnp.dtype(arrays[0].dtype)
    hold = np.float64 if dtype == np.float64 else np.float32

    def rounded(x):
        return x.astype(dtype).astype(hold)

    with np.errstate(over="ignore", invalid="ignore"):
        formula = _formula if normalize else _sums_of_kernels
        results, *_ = formula(hold, rounded, *arrays, **options)
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
    bias = -r(slopes) * _distances(T, S, options, dtype)
    logits = r(r(r(2 * g * products) - r(lam * g * norms)) + r(bias))
    logits = np.where(allowed((*q.shape[:2], T, S), options), logits, -np.inf)
    sink = 0.0 if options.get("origin_sink") else options.get("sink_logits", -np.inf)
    sink = r(np.zeros((N, 1, 1), dtype) + np.asarray(sink, dtype).reshape(-1, 1, 1))
    maximum = np.maximum(logits.max(-1, keepdims=True), sink)
    maximum = np.where(np.isneginf(maximum), 0, maximum).astype(dtype)
    weights = r(np.exp(r(logits - maximum)))
    sink_weights = np.exp(sink - maximum).astype(dtype)
    total = r(weights.sum(-1, keepdims=True) + sink_weights)
    with np.errstate(divide="ignore"):
        lse = r(maximum + r(np.log(total)))
    p = r(weights / np.where(total == 0, 1, total))
    sink_p = r(r(sink_weights) / np.where(total == 0, 1, total))
    pT = p.swapaxes(-1, -2)
    out = r(p @ v)

    dp = r(do @ vT)
    delta = r((p * dp).sum(-1, keepdims=True))
    ds = r(p * r(r(dp - delta) + dl))
    dsT, columns = ds.swapaxes(-1, -2), r(ds.sum(-2))[..., None]
    results = (
        out,
        lse,
        r(2 * g * r(ds @ k)),
        r(r(2 * g * r(dsT @ q)) - r(2 * g * lam * r(columns * k))),
        r(pT @ do),
        r((ds * r(2 * products - lam * norms)).sum((0, 2, 3))),
        r(-(ds * r(g * norms)).sum((0, 2, 3))),
        r((sink_p * r(dl - delta)).sum((0, 2, 3))),
    )

    # The same sums over absolute values. Errors of the logits l move the weights too: to first
    # order by p_j (e_j − Σ_i p_i e_i), which is nothing where one weight is all.
    abs_products = np.abs(q) @ np.abs(kT)
    abs_logits = 2 * g * abs_products + np.abs(lam) * g * norms - bias
    abs_sink = np.where(np.isneginf(sink), 0, np.abs(sink))
    mean_logit = (p * abs_logits).sum(-1, keepdims=True) + sink_p * abs_sink
    moved = abs_logits * (1 - p) + np.maximum(mean_logit - p * abs_logits, 0)
    moved_sink = abs_sink * (1 - sink_p) + np.maximum(mean_logit - sink_p * abs_sink, 0)
    # A backward pass that keeps the logsumexp only feels its rounding: ε|lse|, or all of what the
    # other keys add to the largest logit where that is less, and nothing where one weight is all.
    epsilon = np.finfo(np.float64 if query.dtype == np.float64 else np.float32).eps
    seen = np.where(total == 0, 0, lse)
    of_logsumexp = np.minimum(np.abs(seen), np.abs(seen - maximum) / epsilon)
    abs_p = p * (1 + moved + of_logsumexp)
    abs_sink_p = sink_p * (1 + moved_sink + of_logsumexp)
    # Weights below the smallest normal number may vanish.
    smallest = np.finfo(np.float64 if query.dtype == np.float64 else np.float32).tiny / epsilon
    abs_p = np.where(np.isneginf(logits), 0, np.maximum(abs_p, smallest))
    abs_sink_p = np.where(np.isneginf(sink), 0, np.maximum(abs_sink_p, smallest))
    abs_dp = np.abs(do) @ np.abs(vT)
    abs_delta = (abs_p * abs_dp).sum(-1, keepdims=True)
    abs_ds = abs_p * (abs_dp + np.abs(dl)) + p * abs_delta
    abs_dsink = abs_sink_p * (np.abs(delta) + np.abs(dl)) + sink_p * abs_delta

    def terms(abs_ds, abs_dsink):
        """Sums of the absolute values of the terms of dq, dk, dγ, dλ and those of the sinks."""
        by_key = abs_ds.swapaxes(-1, -2)
        return {
            "query": 2 * g * (abs_ds @ np.abs(k)),
            "key": 2
            * g
            * (by_key @ np.abs(q) + np.abs(lam) * by_key.sum(-1)[..., None] * np.abs(k)),
            "gamma": (abs_ds * (2 * abs_products + np.abs(lam) * norms)).sum((0, 2, 3)),
            "key_norm_weight": (abs_ds * g * norms).sum((0, 2, 3)),
            "sink_logits": abs_dsink.sum((0, 2, 3)),
        }

    scales = Results(
        out=abs_p @ np.abs(v),
        logsumexp=mean_logit + np.abs(seen),
        value=abs_p.swapaxes(-1, -2) @ np.abs(do),
        **terms(abs_ds, abs_dsink),
    )

    def of_output(moved_out, weights, sink_weights):
        """What an output that is off by `moved_out` does to the gradients."""
        moved_delta = (moved_out * np.abs(do)).sum(-1, keepdims=True)
        return Results(
            out=np.zeros_like(out),
            logsumexp=np.zeros_like(lse),
            value=np.zeros_like(v),
            **terms(weights * moved_delta, sink_weights * moved_delta),
        )

    with np.errstate(divide="ignore", invalid="ignore"):
        bounds = g * (q * q).sum(-1, keepdims=True) / lam
    bounded = (lam > 0) & (bounds <= LARGEST_BOUND)
    rounded_p = np.where(bounded, p, 0)
    rounded_out = rounded_p @ np.abs(v)
    # Logits that are measured from a bound less HEADROOM are rounded as numbers of that size are.
    in_float32 = np.finfo(np.float32).eps / float(jnp.finfo(query.dtype).eps)
    rounded_lse = np.where(bounded & (total > 0), HEADROOM * in_float32, 0)
    rounding = of_output(rounded_out, rounded_p, np.where(bounded, sink_p, 0))
    rounding = rounding._replace(out=rounded_out, logsumexp=rounded_lse)
    with np.errstate(over="ignore", invalid="ignore"):
        kept = np.abs(out - out.astype(query.dtype).astype(dtype))
    kept = of_output(np.where(np.isfinite(kept), kept, 0), p, sink_p)
    sink_axes = np.ndim(options["sink_logits"]) if "sink_logits" in options else None
    heads = K, np.ndim(gamma), np.ndim(key_norm_weight), sink_axes
    return tuple(_public(heads, *x) for x in (results, scales, rounding, kept))


def _sums_of_kernels(
    dtype, rounded, query, key, value, gamma, key_norm_weight, dout, dlse, **options
):
    """Σ_j exp(−γ‖q − k‖² + (1 − λ)γ‖k‖²) v_j by distances, pair by pair; the sum's logarithm."""
    r = rounded
    q, k, v, do, dl = (np.asarray(x, dtype) for x in (query, key, value, dout, dlse))
    (B, T, N, _), S, K = q.shape, k.shape[1], k.shape[2]
    g = r(np.zeros((N, 1, 1), dtype) + np.asarray(gamma, dtype).reshape(-1, 1, 1))
    lam = r(np.zeros((N, 1, 1), dtype) + np.asarray(key_norm_weight, dtype).reshape(-1, 1, 1))
    q, do = q.transpose(0, 2, 1, 3), do.transpose(0, 2, 1, 3)  # B N T H
    k, v = (np.repeat(x, N // K, axis=2).transpose(0, 2, 1, 3) for x in (k, v))  # B N S H
    dl = r(dl.transpose(0, 2, 1)[..., None])

    apart = r(q[:, :, :, None] - k[:, :, None])  # B N T S H
    distances = r((apart * apart).sum(-1))
    norms = r((k * k).sum(-1))[:, :, None, :]
    slopes = np.asarray(options.get("alibi_slopes", np.zeros(N)), dtype)[:, None, None]
    bias = -r(slopes) * _distances(T, S, options, dtype)
    exponents = r(r(r((1 - lam) * g * norms) - r(g * distances)) + r(bias))
    exponents = np.where(allowed((B, N, T, S), options), exponents, -np.inf)
    w = r(np.exp(exponents))
    largest = exponents.max(-1, keepdims=True)
    largest = np.where(np.isneginf(largest), 0, largest)
    shares = r(np.exp(exponents - largest))
    total = r(shares.sum(-1, keepdims=True))
    with np.errstate(divide="ignore"):
        lse = r(largest + r(np.log(total)))
    p = r(shares / np.where(total == 0, 1, total))
    out = r(w @ v)

    ds = r(r(w * r(do @ v.swapaxes(-1, -2))) + r(p * dl))
    pulls = r(2 * g[..., None] * r(ds[..., None] * apart))  # to the keys
    columns = r(ds.sum(-2))[..., None]
    results = (
        out,
        lse,
        r(-pulls.sum(-2)),
        r(r(pulls.sum(-3)) + r(2 * g * (1 - lam) * columns * k)),
        r(w.swapaxes(-1, -2) @ do),
        r((ds * r((1 - lam) * norms - distances)).sum((0, 2, 3))),
        r(-(ds * r(g * norms)).sum((0, 2, 3))),
    )
    scales = _scales_of_sums(q, k, v, do, dl, g, lam, -bias, exponents, w, p)
    # What is rounded where the softmax's output is: the cotangent that it is multiplied by.
    moved = (np.abs(out) * np.abs(do)).sum(-1, keepdims=True) * float(jnp.finfo(query.dtype).eps)
    kept = scales(0 * w, p * moved)
    rounding = scales(w, p * ((w @ np.abs(v)) * np.abs(do)).sum(-1, keepdims=True))
    heads = K, np.ndim(gamma), np.ndim(key_norm_weight), None
    every = results, scales(None, None), rounding, kept
    return tuple(_public(heads, *x) for x in every)


def _scales_of_sums(q, k, v, do, dl, g, lam, alibi, exponents, w, p):
    """What makes the sums of absolute values, of all terms or of weights and dS that are given."""
    abs_products = np.abs(q) @ np.abs(k).swapaxes(-1, -2)
    squares, norms = (q * q).sum(-1, keepdims=True), (k * k).sum(-1)[:, :, None, :]
    sizes = 2 * g * abs_products + g * squares + np.abs(lam) * g * norms + alibi
    mean_size = (p * sizes).sum(-1, keepdims=True)
    allowed_pairs = ~np.isneginf(exponents)
    tiny = np.finfo(np.float32).tiny / np.finfo(np.float32).eps
    abs_w = np.where(allowed_pairs, np.maximum(w * (1 + sizes + mean_size), tiny), 0)
    abs_p = np.where(allowed_pairs, np.maximum(p * (1 + sizes + mean_size), tiny), 0)
    abs_dp = np.abs(do) @ np.abs(v).swapaxes(-1, -2)
    abs_ds = abs_w * abs_dp + abs_p * np.abs(dl) + p * (abs_w * abs_dp).sum(-1, keepdims=True)

    def scales(weights, ds):
        everything = weights is None
        weights, ds = (abs_w, abs_ds) if everything else (weights, ds)
        by_key = ds.swapaxes(-1, -2)
        own = ds.sum(-1, keepdims=True) * np.abs(q)
        return Results(
            weights @ np.abs(v),
            mean_size if everything else 0 * mean_size,
            2 * g * (ds @ np.abs(k) + own),
            2 * g * (by_key @ np.abs(q) + np.abs(lam) * by_key.sum(-1)[..., None] * np.abs(k)),
            weights.swapaxes(-1, -2) @ np.abs(do),
            (ds * (2 * abs_products + squares + np.abs(lam) * norms)).sum((0, 2, 3)),
            (ds * g * norms).sum((0, 2, 3)),
        )

    return scales


def _public(heads, out, lse, dq, dk, dv, dgamma, dlambda, dsink=None) -> Results:
    """Heads after lengths, heads of a group summed, numbers shared by all heads summed."""
    K, gamma_axes, lambda_axes, sink_axes = heads
    dsink = np.empty(0) if sink_axes is None or dsink is None else dsink

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
        dsink.sum() if sink_axes == 0 else dsink,
    )
