"""What the public function refuses, in which words, and what it chooses."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbf_jax import rbf_attention
from rbf_jax.ops import dispatch
from rbf_jax.ops.gpu import device
from rbf_jax.ops.gpu.triton import launch

Q = jnp.ones((2, 6, 4, 8))
K = jnp.ones((2, 5, 2, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": Q[0, 0]}, r"query has shape \(4, 8\).* 4-D"),
        ({"key": K[0]}, r"key has shape \(5, 2, 8\).* 4-D"),
        ({"key": K.astype(jnp.bfloat16)}, r"key has dtype bfloat16.*query's dtype float32"),
        ({"query": jnp.ones((2, 6, 4, 8), int)}, r"query has dtype int.*must be one of"),
        (
            {"key": jnp.ones((3, 5, 2, 8))},
            r"key has shape \(3, 5, 2, 8\).*query's shape \(2, 6, 4, 8\)",
        ),
        ({"value": K[:, :4]}, r"value has shape \(2, 4, 2, 8\).*key's shape"),
        ({"query": Q[:, :, :3]}, r"query has 3 heads and key 2"),
        ({"query": Q[:, :0]}, r"query has shape \(2, 0, 4, 8\).*no axis may be empty"),
        ({"mask": jnp.ones((2, 4, 6, 5))}, r"mask has dtype float32.*bool"),
        ({"mask": jnp.ones((2, 2, 6, 5), bool)}, r"mask has shape .*broadcastable.*\(2, 4, 6, 5\)"),
        ({"mask": jnp.ones((1, 2, 4, 6, 5), bool)}, r"mask has shape \(1, 2, 4, 6, 5\)"),
        ({"gamma": 0.0}, r"gamma=0.0 must be finite and greater than 0"),
        ({"gamma": float("nan")}, r"gamma=nan must be finite"),
        ({"gamma": np.ones(3)}, r"gamma has shape \(3,\).*\(N,\) = \(4,\)"),
        ({"gamma": "large"}, r"gamma='large' must be numbers, finite and greater than 0"),
        ({"gamma": jnp.float32(-1)}, r"gamma=-1.0 must be finite and greater than 0"),
        ({"gamma": 1e39}, r"gamma=1e\+39 must be finite and greater than 0 in float32"),
        ({"gamma": True}, r"gamma has dtype bool"),
        ({"alibi_slopes": jnp.ones(4, jnp.complex64)}, r"alibi_slopes has dtype complex64"),
        ({"query": None}, r"query is NoneType None, but must be an array"),
        ({"mask": "none"}, r"mask is str 'none', but must be an array"),
        ({"query_seq_lengths": "ab"}, r"query_seq_lengths is str 'ab', but must be an array"),
        ({"implementation": ["xla"]}, r"implementation=\['xla'\] must be None or one of"),
        ({"key_norm_weight": float("inf")}, r"key_norm_weight=inf must be finite"),
        ({"key_norm_weight": jnp.ones(2)}, r"key_norm_weight has shape \(2,\)"),
        ({"is_causal": "yes"}, r"is_causal='yes' must be a Python bool"),
        ({"origin_sink": 1}, r"origin_sink=1 must be a Python bool"),
        ({"normalize": 0}, r"normalize=0 must be a Python bool"),
        ({"normalize": False, "origin_sink": True}, r"origin_sink=True has no effect with norm"),
        ({"normalize": False, "sink_logits": 1.0}, r"sink_logits has no effect with normalize=Fa"),
        ({"origin_sink": True, "sink_logits": 1.0}, r"origin_sink=True is sink_logits=0 and"),
        ({"sink_logits": np.ones(3)}, r"sink_logits has shape \(3,\).* scalar .*\(N,\) = \(4,\)"),
        ({"sink_logits": float("nan")}, r"sink_logits=nan must be finite in float32"),
        ({"sink_logits": -float("inf")}, r"sink_logits=-inf must be finite in float32"),
        ({"sink_logits": True}, r"sink_logits has dtype bool"),
        ({"num_global_keys": -1}, r"num_global_keys=-1 must be an int from 0 to .* 5"),
        ({"num_global_keys": 6}, r"num_global_keys=6 must be an int from 0 to .* 5"),
        ({"num_global_keys": 2.0}, r"num_global_keys=2.0 must be an int"),
        ({"num_global_keys": True}, r"num_global_keys=True must be an int"),
        ({"scale": 0.5}, r"scale=0.5 is not taken: pass gamma = scale / 2"),
        ({"return_residual": None}, r"return_residual=None must be a Python bool"),
        ({"local_window_size": -1}, r"local_window_size=-1 must be"),
        ({"local_window_size": (1, 2, 3)}, r"local_window_size=\(1, 2, 3\) must be"),
        ({"local_window_size": 1.5}, r"local_window_size=1.5 must be"),
        ({"query_seq_lengths": jnp.ones(2)}, r"query_seq_lengths has dtype float32"),
        ({"key_value_seq_lengths": jnp.ones(3, int)}, r"key_value_seq_lengths has shape \(3,\)"),
        (
            {"query_segment_ids": jnp.ones((2, 6), int)},
            r"query_segment_ids is given without key_value_segment_ids",
        ),
        (
            {
                "query_segment_ids": jnp.ones((2, 6), int),
                "key_value_segment_ids": jnp.ones((2, 6), int),
            },
            r"key_value_segment_ids has shape \(2, 6\), but must have shape \(2, 5\)",
        ),
        ({"alibi_slopes": np.ones(3)}, r"alibi_slopes has shape \(3,\).*\(4,\)"),
        ({"alibi_slopes": -np.ones(4)}, r"alibi_slopes=.*not negative"),
        ({"implementation": "fast"}, r"implementation='fast' must be None or one of"),
    ],
)
def test_wrong_input(change, message):
    arguments = {"query": Q, "key": K, "value": K, **change}
    with pytest.raises(ValueError, match=message):
        rbf_attention(**arguments)


def test_bias_is_refused_with_advice():
    with pytest.raises(NotImplementedError, match=r"bias of shape \(6, 5\) is not supported"):
        rbf_attention(Q, K, K, bias=jnp.zeros((6, 5)))


def pretend_gpu(monkeypatch, capability):
    """For which there is no Triton."""
    monkeypatch.setattr(device, "unavailable", lambda: None)
    monkeypatch.setattr(device, "target", lambda: device.Target("a GPU", capability))
    monkeypatch.setattr(launch, "unavailable", lambda: "is not there")


def test_cudnn_by_name_never_falls_back(monkeypatch):
    monkeypatch.setattr(device, "unavailable", lambda: "needs an NVIDIA GPU")
    with pytest.raises(
        NotImplementedError, match=r"needs an NVIDIA GPU.*'xla' and 'reference' can"
    ):
        rbf_attention(Q, K, K, implementation="cudnn")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "supports bfloat16 and float16, not float32"),
        ({"dtype": jnp.bfloat16, "gamma": jnp.ones(4)}, "needs gamma as one number"),
        ({"dtype": jnp.bfloat16, "mask": jnp.ones((6, 4), bool)}, "does not support mask"),
        (
            {"dtype": jnp.bfloat16, "origin_sink": True},
            "does not support sink_logits or origin_sink",
        ),
        ({"dtype": jnp.bfloat16, "sink_logits": jnp.ones(4)}, "does not support sink_logits or or"),
        ({"dtype": jnp.bfloat16, "return_residual": True}, "does not support return_residual or"),
        ({"dtype": jnp.bfloat16, "local_window_size": 3}, "together with is_causal"),
        ({"dtype": jnp.bfloat16, "key_norm_weight": 1.0}, "needs key_norm_weight=0, known when"),
        ({"dtype": jnp.bfloat16, "key_norm_weight": jnp.zeros(4)}, "needs key_norm_weight=0"),
        ({"dtype": jnp.bfloat16, "H": 136}, "multiples of 8 up to 128 as head dimensions, not 136"),
        ({"dtype": jnp.bfloat16, "H": 12}, "multiples of 8 up to 128 as head dimensions, not 12"),
    ],
)
def test_what_cudnn_refuses_on_a_gpu(monkeypatch, change, message):
    """Each refusal names the reason and who can; the GPU is pretended, nothing is launched."""
    pretend_gpu(monkeypatch, 80)
    change = {"key_norm_weight": 0.0, **change}
    dtype, H = change.pop("dtype", jnp.float32), change.pop("H", 8)
    q, k = jnp.ones((2, 6, 4, H), dtype), jnp.ones((2, 4, 2, H), dtype)
    with pytest.raises(NotImplementedError, match=message + ".*'xla' and 'reference' can do"):
        rbf_attention(q, k, k, implementation="cudnn", **change)


def test_default_follows_the_platform_that_compiles(monkeypatch):
    """With a GPU the default holds cuDNN's call for CUDA, and still runs when placed on a CPU."""
    pretend_gpu(monkeypatch, 90)
    pretended = dispatch.ATTENTION["cudnn"]._replace(attend=lambda i, m, r: (2 * i.query, None))
    monkeypatch.setitem(dispatch.ATTENTION, "cudnn", pretended)
    on_cpu = jax.device_put((Q[:, :4], K[:, :4]), jax.devices("cpu")[0])
    q, k = (x.astype(jnp.bfloat16) for x in on_cpu)
    f = jax.jit(lambda q, k: rbf_attention(q, k, k, key_norm_weight=0.0))
    assert " platform_index" in str(jax.make_jaxpr(f)(q, k))
    np.testing.assert_array_equal(f(q, k), jnp.ones_like(q))  # equal values: their mean is 1


def test_choice_is_logged_once(caplog, monkeypatch):
    pretend_gpu(monkeypatch, 90)
    reason = "needs an NVIDIA GPU, and JAX's default backend is cpu"
    monkeypatch.setattr(launch, "unavailable", lambda: reason)
    dispatch._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="rbf_jax"):
        rbf_attention(Q, K, K)
        rbf_attention(Q, K, K)
    assert [record.getMessage() for record in caplog.records] == [
        "rbf_attention: implementation=None takes 'xla': 'triton' needs an NVIDIA GPU, and JAX's "
        "default backend is cpu."
    ]


def test_unbatched_shapes_are_named_as_they_were_passed():
    with pytest.raises(ValueError, match=r"key has shape \(5, 2, 4\).*query's shape \(6, 4, 8\)"):
        rbf_attention(Q[0], K[0, ..., :4], K[0, ..., :4])


def test_integers_beyond_32_bits():
    """Under x64, lengths are cut to the sequence and segments are compared as they are."""
    with jax.enable_x64(True):
        lengths = jnp.array([2**32 + 1, -(2**32)])
        got = rbf_attention(Q, K, K, key_value_seq_lengths=lengths)
        np.testing.assert_array_equal(got[0], jnp.ones_like(Q[0]))
        np.testing.assert_array_equal(got[1], jnp.zeros_like(Q[1]))
        ids = {"query_segment_ids": jnp.zeros((2, 6), int)}
        other = jnp.full((2, 5), 2**32)
        got = rbf_attention(Q, K, K, **ids, key_value_segment_ids=other)
        np.testing.assert_array_equal(got, jnp.zeros_like(Q))


def test_shapes_without_computing():
    out, logsumexp = jax.eval_shape(lambda q, k: rbf_attention(q, k, k, return_residual=True), Q, K)
    assert (out.shape, out.dtype) == (Q.shape, Q.dtype)
    assert (logsumexp.shape, logsumexp.dtype) == (Q.shape[:3], jnp.float32)
