"""From documents to losses: what rows are packed from has the losses that it has by itself."""

import jax
import numpy as np
import pytest

from rbf_jax.data import load_data
from rbf_jax.nn import AttentionConfig, CausalLM, TransformerConfig
from rbf_jax.training.step import make_loss, model_inputs
from tests.harness import corpus
from tests.harness.models import random_variables

T = 288
MODELS = {
    "susie, registers": ({}, {"num_registers": 2}),
    "dot, rope, window, learned sink": (
        {"kind": "dot", "window": 9, "sink": "learned"},
        {"positions": "rope", "num_registers": 1},
    ),
    "alibi, sink": ({"sink": "origin"}, {"positions": "alibi"}),
    "learned, not normalised": (
        {"normalize": False, "gamma": 0.05},
        {"positions": "learned", "num_registers": 1},
    ),
}


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    """All documents of the corpus as one batch of each layout, in rows that hold the longest."""

    def batch(layout):
        folder = tmp_path_factory.mktemp(layout)
        data = load_data(corpus.config(folder, context_length=T, layout=layout), seed=0)
        rows = data.num_rows("train")
        (only,) = data.batches("train", rows, shuffle=False, repeat=False)
        return only

    return {layout: batch(layout) for layout in ("packed", "padded")}


def _of_documents(batch, losses):
    """The losses of each document, by its tokens."""
    found: dict[bytes, list[np.ndarray]] = {}
    for row, ids in enumerate(batch["segment_ids"]):
        for segment in range(1, ids.max() + 1):
            here = ids == segment
            tokens = np.append(batch["inputs"][row][here], batch["targets"][row][here][-1])
            found.setdefault(tokens.tobytes(), []).append(losses[row][here])
    return found


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_have_the_losses_and_gradients_of_unpacked_ones(name, batches):
    attention, changes = MODELS[name]
    sizes = {"num_layers": 1, "d_model": 16, "num_heads": 2, "vocab_size": 257}
    config = TransformerConfig(
        context_length=T, attention=AttentionConfig(**attention), **sizes, **changes
    )
    model = CausalLM(config)
    params = random_variables(model, batches["packed"]["inputs"][:1])["params"]
    losses, gradients = {}, {}
    for layout, batch in batches.items():
        inputs = model_inputs(batch, packed=layout == "packed")

        @jax.jit
        def run(params, batch=batch, inputs=inputs, layout=layout):
            every = model.apply(
                {"params": params},
                batch["inputs"],
                batch["targets"],
                **inputs,
                method="token_losses",
            )
            return every, jax.grad(make_loss(model, packed=layout == "packed"))(params, batch)

        every, gradients[layout] = run(params)
        losses[layout] = _of_documents(batch, np.asarray(every))
    assert len(batches["packed"]["inputs"]) < len(batches["padded"]["inputs"]) / 2
    assert sum(map(len, losses["packed"].values())) == len(corpus.DOCUMENTS)
    assert losses["packed"].keys() == losses["padded"].keys()
    for document, expected in losses["padded"].items():
        for ours, theirs in zip(losses["packed"][document], expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
    for ours, theirs in zip(*(jax.tree.leaves(gradients[x]) for x in ("packed", "padded"))):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max() + 1e-4, rtol=1e-3)
