import dataclasses
import math

import pytest

from rbf_jax.nn import AttentionConfig, TransformerConfig
from rbf_jax.nn.config import from_stored, num_registers
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
        ({"sink": "origni"}, "attention.sink='origni' must be one of .*; did you mean 'origin'"),
        *(
            ({"sink": sink, "normalize": False}, f"attention.sink='{sink}' has no effect with att")
            for sink in ("origin", "learned")
        ),
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
        ({"num_registers": 0}, "num_registers=0 .* attention.sink='register' .* set att.*='none'"),
        (
            {"num_registers": 2, "attention": {"sink": "none"}},
            "num_registers=2 contradicts attention.sink='none'; set .* or num_registers=None",
        ),
        *(
            (
                {"num_registers": 0, "attention": attention, "register_init": "normal"},
                "register_init='normal' has no effect with num_registers=0",
            )
            for attention in ({"sink": sink} for sink in ("none", "origin", "learned"))
        ),
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


@pytest.mark.parametrize(
    ("sink", "given", "number"),
    [
        ("none", None, 0),
        ("none", 0, 0),
        ("origin", None, 0),
        ("origin", 3, 3),
        ("learned", None, 0),
        ("learned", 1, 1),
        ("register", None, 1),
        ("register", 4, 4),
    ],
)
def test_registers_are_as_many_as_the_sink_needs(sink, given, number):
    attention = AttentionConfig(sink=sink)
    config = TransformerConfig(5, 4, num_registers=given, attention=attention)
    assert config.num_registers == number
    assert dataclasses.replace(config, num_layers=2).num_registers == number
    section = {"num_registers": given, "attention": {"sink": sink}}
    assert num_registers(section) == number


@pytest.mark.parametrize(
    ("stored", "sink", "registers"),
    [
        ((False, 0), "none", None),
        ((False, 1), "register", None),
        ((False, 4), "register", 4),
        ((True, 0), "origin", None),
        ((True, 1), "origin", 1),
        ((True, 4), "origin", 4),
    ],
)
def test_stored_models_have_the_keys_of_today(stored, sink, registers):
    """A model is the same as before, and equals its configuration as it is written today."""
    origin_sink, number = stored
    old = {"d_model": 16, "num_registers": number, "attention": {"origin_sink": origin_sink}}
    found = from_stored(old)
    assert found == {"d_model": 16, "num_registers": registers, "attention": {"sink": sink}}
    assert num_registers(found) == number
    assert from_stored(found) == found
    assert old["attention"] == {"origin_sink": origin_sink}
    AttentionConfig(**found["attention"])


def test_keys_that_a_stored_model_lacks_were_at_their_defaults():
    found = from_stored({"attention": {"kind": "dot"}})
    assert found == {"num_registers": None, "attention": {"kind": "dot", "sink": "register"}}
