import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from rbf_jax.nn import CausalLM, TransformerConfig
from rbf_jax.training.optimizer import make_optimizer, make_schedule
from rbf_jax.training.sharding import batch_sharding, make_mesh, place_batch, state_shardings
from rbf_jax.training.state import create_state
from rbf_jax.training.step import (
    _micro_batches,
    make_eval_step,
    make_inspect_step,
    make_train_step,
)


@pytest.fixture(scope="module")
def model():
    return CausalLM(TransformerConfig(32, 16, num_layers=1, d_model=16, num_heads=2))


@pytest.fixture(scope="module")
def params(model):
    """What `create_state` begins with, for the seed 0."""
    return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


@pytest.fixture(scope="module")
def eval_step(model):
    return jax.jit(make_eval_step(model))


def apply_for_inspection(model, params, batch):
    inputs = (batch[name] for name in ("inputs", "positions", "segment_ids"))
    apply = jax.jit(functools.partial(model.apply, mutable=["intermediates"]))
    return apply({"params": params}, *inputs)


@pytest.fixture(scope="module")
def one_step(model, batch):
    """(devices, accumulate_steps, batch) → the state after one step, and its metrics."""
    config = base.get_config().optimizer
    config.warmup_steps = 0

    def run(devices=1, accumulate_steps=1, batch=batch):
        mesh = make_mesh(devices=jax.devices()[:devices])
        optimizer = make_optimizer(config, 10)
        state = create_state(model, optimizer, 0, mesh)
        shardings = state_shardings(mesh, state)
        step = make_train_step(
            model,
            optimizer,
            make_schedule(config, 10),
            accumulate_steps=accumulate_steps,
        )
        step = jax.jit(
            step,
            in_shardings=(shardings, batch_sharding(mesh)),
            out_shardings=(shardings, None),
        )
        return step(state, place_batch(batch, mesh))

    return run


@pytest.fixture(scope="module")
def plain(one_step):
    return one_step()


def assert_close(actual, expected):
    # Where a gradient is rounding noise, Adam makes a whole step of it; elsewhere all agree.
    different = total = 0
    for a, b in zip(jax.tree.leaves(actual.params), jax.tree.leaves(expected.params)):
        different += int(np.sum(~np.isclose(a, b, rtol=1e-4, atol=1e-6)))
        total += a.size
    assert different < 0.005 * total


def test_golden_metrics(plain):
    state, metrics = plain
    assert float(metrics["loss"]) == pytest.approx(3.44501, rel=1e-4)
    assert float(metrics["grad_norm"]) == pytest.approx(0.78120, rel=1e-4)
    assert float(metrics["learning_rate"]) == pytest.approx(9.7577e-4, rel=1e-4)
    assert (int(state.step), int(state.bad_step)) == (1, 0)


def test_loss_is_the_mean_over_targets_that_count(plain, model, params, eval_step, batch):
    logits, _ = apply_for_inspection(model, params, batch)
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    losses = -np.take_along_axis(log_probs, batch["targets"][..., None], axis=-1)[..., 0]
    expected = losses[batch["loss_mask"]]
    assert float(plain[1]["loss"]) == pytest.approx(expected.mean(), rel=1e-5)
    loss, targets = eval_step(params, batch)
    assert float(loss) == pytest.approx(expected.sum(), rel=1e-5)
    assert int(targets) == expected.size


def test_two_devices_do_what_one_does(plain, one_step, batch):
    shards = place_batch(batch, make_mesh())["inputs"].addressable_shards
    assert {shard.device: shard.data.shape for shard in shards} == dict.fromkeys(
        jax.devices(), (2, 16)
    )
    state, metrics = one_step(devices=2)
    np.testing.assert_allclose(metrics["loss"], plain[1]["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], plain[1]["grad_norm"], rtol=1e-5)
    assert_close(state, plain[0])


def test_accumulated_gradients_are_those_of_the_whole_batch(plain, one_step):
    # The rows have different numbers of targets, so a mean of means would differ.
    state, metrics = one_step(accumulate_steps=2)
    np.testing.assert_allclose(metrics["loss"], plain[1]["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], plain[1]["grad_norm"], rtol=1e-5)
    assert_close(state, plain[0])


def test_in_every_micro_batch_a_device_has_rows_of_its_own():
    micro_batches = _micro_batches({"inputs": np.arange(8)[:, None]}, 2)["inputs"]
    # Of two devices the first holds rows 0 to 3, and the first half of each micro-batch.
    assert micro_batches[:, :2, 0].tolist() == [[0, 2], [1, 3]]
    assert micro_batches[:, 2:, 0].tolist() == [[4, 6], [5, 7]]


def test_padded_rows_need_no_segments(model, params, eval_step, batch):
    # One document a row: what counts is the same whether the padding is masked or not.
    is_padded = (np.arange(4) >= 2)[:, None]
    rows = {**batch, "loss_mask": batch["loss_mask"] & is_padded}
    rows["positions"] = np.tile(np.arange(16, dtype=np.int32), (4, 1))
    without_segments = jax.jit(make_eval_step(model, packed=False))
    for actual, expected in zip(without_segments(params, rows), eval_step(params, rows)):
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
    segments_matter = {**batch, "loss_mask": batch["loss_mask"] & ~is_padded}
    actual, expected = (f(params, segments_matter)[0] for f in (without_segments, eval_step))
    assert not np.allclose(actual, expected, rtol=1e-4)


def test_inspection(model, params, batch):
    metrics = jax.jit(make_inspect_step(model, rows=4))(params, batch)
    sown = apply_for_inspection(model, params, batch)[1]["intermediates"]["block_0"]["attention"]
    # One register in front; padding is not text.
    norms = np.asarray(sown["key_norms"][0])[:, 1:][batch["segment_ids"] > 0]
    np.testing.assert_allclose(metrics["key_norm_mean"], norms.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["key_norm_max"], norms.max(), rtol=1e-5)
    np.testing.assert_allclose(metrics["logit_max"], sown["logit_max"][0], rtol=1e-5)
    np.testing.assert_allclose(metrics["gamma/0"], [8**-0.5] * 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["key_norm_weight/0"], [1.0, 1.0])
    assert metrics["register_norm"] == 0


def test_padding_is_not_inspected(model, params, batch):
    # One document a row, as the layout "padded" makes them.
    rows = {name: array[2:] for name, array in batch.items()}
    inspect_step = jax.jit(make_inspect_step(model))
    # As they are, registers have the largest logit.
    params = jax.tree.map(lambda p: 20 * p, params)
    is_padding = rows["segment_ids"] == 0
    results = [
        inspect_step(params, {**rows, "inputs": np.where(is_padding, token, 1)})
        for token in range(0, 32, 4)
    ]
    for result in results:
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), result, results[0])


def test_inspection_takes_memory_in_proportion_to_the_context(model, params):
    inspect_step = jax.jit(make_inspect_step(model))

    def temporary_bytes(length):
        names = ("inputs", "targets", "positions", "segment_ids", "loss_mask")
        batch = {name: jax.ShapeDtypeStruct((2, length), jnp.int32) for name in names}
        return inspect_step.lower(params, batch).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(4096) < 2.3 * temporary_bytes(2048)
