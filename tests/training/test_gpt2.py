import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from rbf_jax.training.gpt2 import GPT2Folder, load_gpt2
from tests.harness import gpt2_folder
from tests.harness.gpt2_folder import CONFIG, POSITIONS, random_tensors, write_folder

TOKENS = np.random.default_rng(3).integers(0, CONFIG["vocab_size"], POSITIONS).astype(np.int32)


def test_the_same_logits_as_an_independent_gpt2(tmp_path):
    model, variables, tokenizer = load_gpt2(write_folder(tmp_path))
    logits = jax.jit(model.apply)(variables, TOKENS[None])[0]
    expected = gpt2_folder.logits(random_tensors(), TOKENS)
    assert np.abs(expected).max() > 1  # else agreeing to 1e-4 says little
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert tokenizer.decode(tokenizer.encode("this that")) == "this that"


def test_layouts_of_the_weights(tmp_path):
    """transformers' own prefix, masks, tied heads, half precision, and several files."""
    tensors = random_tensors()
    plain = GPT2Folder(write_folder(tmp_path / "plain")).params()

    def same(folder, tolerance=0.0):
        params = GPT2Folder(folder).params()
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance), params, plain)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}

    masks = {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32)}
    masks |= {"h.1.attn.masked_bias": np.float32([-1e4]), "lm_head.weight": tensors["wte.weight"]}
    same(write_folder(tmp_path / "prefix", tensors | masks, prefix="transformer."))
    for dtype in (np.float16, ml_dtypes.bfloat16):
        half = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
        same(write_folder(tmp_path / "half", half), 2.0**-8)
    parts = write_folder(tmp_path / "parts")
    (parts / "model.safetensors").unlink()
    names = list(tensors)
    index = {}
    for number, chosen in enumerate((names[::2], names[1::2])):
        file = f"model-0000{number}.safetensors"
        safetensors.numpy.save_file({name: tensors[name] for name in chosen}, parts / file)
        index |= dict.fromkeys(chosen, file)
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    same(parts)


def test_a_head_of_its_own(tmp_path):
    head = {"lm_head.weight": random_tensors(7)["wte.weight"]}
    folder = write_folder(tmp_path, random_tensors() | head, tie_word_embeddings=False)
    params = GPT2Folder(folder).params()
    np.testing.assert_array_equal(params["head"], head["lm_head.weight"])
    write_folder(tmp_path, random_tensors() | head)
    with pytest.raises(ValueError, match=r"lm_head.weight unlike wte.weight"):
        GPT2Folder(tmp_path).params()


def test_a_tokenizer_in_two_files_is_the_same(tmp_path):
    text = "thirty thin things, été <|endoftext|>"
    ids = [
        GPT2Folder(write_folder(tmp_path / files, tokenizer_files=files)).tokenizer()
        for files in ("tokenizer.json", "vocab.json")
    ]
    assert ids[0].encode(text) == ids[1].encode(text)
    assert ids[0].eos_id == ids[1].eos_id == CONFIG["vocab_size"] - 1
    assert ids[0].vocab_size == ids[1].vocab_size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "has model_type 'llama'; it must be 'gpt2'"),
        ({"activation_function": "gelu"}, "activation_function 'gelu'; it must be 'gelu_new'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon 1e-06; it must be 1e-05"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        ({"n_layer": 0}, "has n_layer 0; it must be an integer of at least 1"),
        ({"n_inner": 25}, "n_inner 25; it must be a multiple of n_embd = 24"),
    ],
)
def test_another_model_is_an_error(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        GPT2Folder(write_folder(tmp_path, **changes))


def test_other_tensors_are_an_error(tmp_path):
    tensors = random_tensors()

    def check(message, tensors, **changes):
        with pytest.raises(ValueError, match=message) as error:
            GPT2Folder(write_folder(tmp_path, tensors, **changes)).params()
        assert "\n" not in str(error.value)

    name = "h.1.mlp.c_fc.weight"
    check(f"has no tensor {name}", {n: t for n, t in tensors.items() if n != name})
    # torch's Linear has (out, in).
    turned = {name: np.ascontiguousarray(tensors[name].T)}
    check(r"c_fc.weight has shape \(96, 24\), but must have \(24, 96\)", tensors | turned)
    check(r"wpe.weight has shape \(20, 24\), but must have \(30, 24\)", tensors, n_positions=30)
    check(r"has a tensor h.1.\S+; GPT-2 has no place for it", tensors, n_layer=1)


def test_damaged_folders_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"is no folder of a model: no config.json is in it"):
        GPT2Folder(tmp_path)
    folder = write_folder(tmp_path)
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read"):
        GPT2Folder(folder).params()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"does not exist: weights are read from safetensors only"):
        GPT2Folder(folder).params()
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object, not list"):
        GPT2Folder(folder)


def test_another_models_tokenizer_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="has 258 tokens, but the model has 300"):
        GPT2Folder(write_folder(tmp_path, vocab_size=300)).tokenizer()
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer.json does not exist"):
        GPT2Folder(tmp_path).tokenizer()
