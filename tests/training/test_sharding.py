"""Rules and shares; what the compiler makes of them is in test_meshes.py."""

from types import SimpleNamespace

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from rbf_jax.nn import AttentionConfig, CausalLM, TransformerConfig
from rbf_jax.training.optimizer import make_optimizer
from rbf_jax.training.sharding import (
    AXES,
    axis_sizes,
    data_share,
    make_mesh,
    parameter_spec,
    state_shardings,
)
from tests.harness.tiny import tiny_config


def sizes(*values):
    return dict(zip(AXES, values))


class FakeMesh:
    """A mesh of devices that only say which process they belong to."""

    def __init__(self, *values, per_process=4):
        count = int(np.prod(values))
        devices = [SimpleNamespace(process_index=i // per_process) for i in range(count)]
        self.shape, self.devices = sizes(*values), np.array(devices).reshape(values)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [((-1, 1, 1, 1), (8, 1, 1, 1)), ((2, -1, 2, 1), (2, 2, 2, 1)), ((1, 1, 2, 4), (1, 1, 2, 4))],
)
def test_axis_sizes(wanted, expected):
    assert axis_sizes(sizes(*wanted), 8) == sizes(*expected)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ((2, 2, 1, 1), "mesh is data=2, fsdp=2, tensor=1, seq=1; the product, 4, must be .* 8"),
        ((-1, 3, 1, 1), "the product, 3, must divide the number of devices, 8"),
        ((-1, -1, 1, 1), "only one axis may be -1"),
        ((0, 1, 1, 1), "must be at least 1, or -1 to fill"),
    ],
)
def test_sizes_that_do_not_make_up_the_devices(wanted, message):
    with pytest.raises(ValueError, match=message):
        axis_sizes(sizes(*wanted), 8)


@pytest.mark.parametrize(
    "model",
    [
        {"positions": "learned", "num_registers": 3, "tie_embeddings": False},
        {"positions": "susie", "num_kv_heads": 2},
    ],
)
def test_every_matrix_has_a_rule(model):
    attention = AttentionConfig(
        qk_norm=True, learn_gamma=True, learn_key_norm_weight=True, sink="learned"
    )
    config = TransformerConfig(64, 16, 2, d_model=16, num_heads=4, attention=attention, **model)
    params = jax.eval_shape(CausalLM(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    mesh = SimpleNamespace(shape=sizes(1, 2, 2, 1))
    whole = set()
    for path, array in flax.traverse_util.flatten_dict(params["params"], sep="/").items():
        spec = parameter_spec(path, array.shape, mesh)
        if spec == P():
            whole.add(path.rpartition("/")[2])
        else:
            # All are split over "fsdp"; over "tensor" all but what is looked up by position.
            assert "fsdp" in spec
            assert ("tensor" in spec) == (path != "position_embedding/embedding")
    small = {"scale", "log_gamma", "key_norm_weight", "sink_logits"}
    small |= {"embedding", "weight", "registers"}
    assert whole <= small
    assert parameter_spec("registers/embedding", (3, 16), mesh) == P()


@pytest.mark.parametrize(
    "matrices",
    [
        {"mlp/in/kernel": (16, 64), "mlp/out/kernel": (64, 16)},
        {"attention/value/kernel": (16, 4, 4), "attention/out/kernel": (4, 4, 16)},
    ],
    ids=["mlp", "attention"],
)
def test_what_tensor_splits_is_summed_by_the_matrix_that_follows(matrices):
    mesh = SimpleNamespace(shape=sizes(1, 2, 2, 1))
    specs = [parameter_spec(f"block_0/{path}", shape, mesh) for path, shape in matrices.items()]
    split = [[axis for axis in spec if axis] for spec in specs]
    assert split == [["fsdp", "tensor"], ["tensor", "fsdp"]]


def test_an_axis_that_does_not_divide_a_dimension_is_left_out():
    mesh = SimpleNamespace(shape=sizes(1, 2, 4, 1))
    assert parameter_spec("embedding/embedding", (257, 16), mesh) == P(None, "fsdp")
    assert parameter_spec("block_3/mlp/in/kernel", (15, 60), mesh) == P(None, "tensor")
    # A factored second moment under the parameter's name.
    assert parameter_spec("opt_state/v_row/head", (16,), mesh) == P()


@pytest.mark.parametrize("optimizer", ["run", "accumulating"])
def test_the_optimizer_follows_the_parameters(optimizer, tmp_path):
    config = tiny_config(tmp_path)
    tx = make_optimizer(config.optimizer, 10)
    if optimizer == "accumulating":
        tx = optax.MultiSteps(optax.chain(optax.trace(0.9), tx), 2)
    mesh = make_mesh(sizes(1, 2, 1, 1))
    params = {"block_0": {"mlp": {"in": {"kernel": jnp.zeros((4, 6))}}}, "head": jnp.zeros((3, 8))}
    shardings = state_shardings(mesh, {"params": params, "opt_state": tx.init(params)})
    specs = {
        (path[-1].key, sharding.spec)
        for path, sharding in jax.tree_util.tree_leaves_with_path(shardings["opt_state"])
        if hasattr(path[-1], "key")
    }
    assert specs == {("kernel", P("fsdp", "tensor")), ("head", P("tensor", "fsdp"))}


@pytest.mark.parametrize(
    ("mesh", "shares"),
    [
        (FakeMesh(8, 1, 1, 1), [(0, 2), (1, 2)]),
        (FakeMesh(2, 2, 2, 1), [(0, 2), (1, 2)]),
        (FakeMesh(4, 1, 1, 4), [(0, 4), (1, 4), (2, 4), (3, 4)]),
        # A row is held by two processes, each with half of its tokens.
        (FakeMesh(1, 2, 1, 8), [(0, 2), (0, 2), (1, 2), (1, 2)]),
        (FakeMesh(1, 1, 8, 1), [(0, 1), (0, 1)]),
        (FakeMesh(3, 1, 1, 1, per_process=1), [(0, 3), (1, 3), (2, 3)]),
    ],
)
def test_processes_read_the_rows_that_they_hold(mesh, shares):
    assert [data_share(mesh, process) for process in range(len(shares))] == shares


def test_rows_that_processes_share_in_part_are_an_error():
    with pytest.raises(ValueError, match="tensor × seq must divide the devices of a process"):
        data_share(FakeMesh(2, 1, 6, 1), 0)
