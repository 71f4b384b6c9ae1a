import math

import pytest

from rbf_jax.nn import AttentionConfig, TransformerConfig
from tests.harness.models import small_config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kind": "rbv"},
            r"attention.kind='rbv' must be one of 'rbf', 'dot'; did you mean 'rbf'\?",
        ),
        ({"kind": "dot", "dot_scale": "standart"}, "did you mean 'standard'"),
        ({"implementation": "referense"}, "did you mean 'reference'"),
        ({"dot_scale": "rbf"}, "attention.dot_scale='rbf' has no effect with attention.kind='rbf'"),
        ({"kind": "dot", "gamma": 0.5}, "attention.gamma=0.5 has no effect"),
        ({"kind": "dot", "key_norm_weight": 0.0}, "attention.key_norm_weight=0.0 has no effect"),
        (
            {"kind": "dot", "learn_key_norm_weight": True},
            "learn_key_norm_weight=True has no effect",
        ),
        ({"kind": "dot", "normalize": False}, "attention.normalize=False has no effect"),
        ({"origin_sink": True, "normalize": False}, "attention.origin_sink=True has no effect"),
        ({"gamma": 0.0}, "attention.gamma=0.0 must be greater than 0"),
        ({"gamma": math.nan}, "attention.gamma=nan must be a finite number"),
        ({"key_norm_weight": "1"}, "attention.key_norm_weight='1' must be a finite number"),
        ({"window": -1}, "attention.window=-1 must be None or an int ≥ 0"),
        ({"window": True}, "attention.window=True must be None or an int ≥ 0"),
    ],
)
def test_wrong_attention_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        AttentionConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "suzie"}, r"positions='suzie' must be one of .*; did you mean 'susie'\?"),
        ({"positions": "???"}, r"positions='\?\?\?' must be one of 'susie', .*, 'none'\.$"),
        ({"register_init": "zeros"}, "did you mean 'zero'"),
        ({"norm": "layers"}, "norm='layers' must be one of .*; did you mean 'layer'"),
        ({"dtype": "float16"}, "dtype='float16' must be one of"),
        ({"num_heads": 5, "num_kv_heads": 5}, "num_heads=5 must divide d_model=16"),
        ({"num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=4"),
        ({"num_kv_heads": 0}, "num_kv_heads=0 must be an int ≥ 1"),
        ({"d_model": 12}, "d_model / num_heads = 3 must be even for positions='susie'"),
        ({"num_registers": -1}, "num_registers=-1 must be an int ≥ 0"),
        ({"num_registers": 0, "register_init": "normal"}, "register_init='normal' has no effect"),
        ({"loss_chunk": 0}, "loss_chunk=0 must be an int ≥ 1"),
        ({"num_layers": 2.0}, "num_layers=2.0 must be an int ≥ 1"),
    ],
)
def test_wrong_model_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)


def test_twins_share_the_operation():
    """The dot product is λ = 0 and γ = scale / 2."""
    assert AttentionConfig().initial_gamma(16) == 0.25
    assert AttentionConfig().initial_key_norm_weight() == 1.0
    assert AttentionConfig(gamma=0.7).initial_gamma(16) == 0.7
    assert AttentionConfig(kind="dot").initial_gamma(16) == 0.125
    assert AttentionConfig(kind="dot", dot_scale="rbf").initial_gamma(16) == 0.25
    assert AttentionConfig(kind="dot").initial_key_norm_weight() == 0.0


def test_heads_that_are_left_out_are_as_many_as_query_heads():
    config = TransformerConfig(vocab_size=5, context_length=4, num_heads=8)
    assert (config.kv_heads, config.head_dim) == (8, 32)
