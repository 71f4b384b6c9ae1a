"""The model as programs that run where only JAX is: `jax.export` of prefill and decode step.

Their arguments and results are dicts and lists of arrays, so that who calls them needs no type of
ours. ``rbf_jax/inference/standalone.py`` is such a caller, and goes into the folder as run.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rbf_jax.data.files import replacing, write_text
from rbf_jax.inference.saved import flat_parameters, nested_parameters
from rbf_jax.nn.cache import Cache, empty_cache
from rbf_jax.nn.transformer import CausalLM
from rbf_jax.ops.decode.cache import KeysValues

PLATFORMS = ("cpu", "cuda")


def export_programs(
    model: CausalLM, variables: Mapping[str, Any], *, prompt_length: int, capacity: int
) -> dict[str, jax.export.Exported]:
    """Exports what generation needs, for any number of rows and any lengths of prompts.

    prefill(params, tokens int32 (B, P), lengths int32 (B,)) → logits (B, V) float32, cache
    step(params, cache, tokens int32 (B, 1)) → logits (B, 1, V) float32, cache

    ``params`` are those of model.safetensors, by name. What a row's prompt has no tokens for is
    filled with any; longer prompts are read on by steps. A row that outgrows the cache gives NaN.

    Args:
      model: the language model.
      variables: its parameters, for their shapes.
      prompt_length: P.
      capacity: the most tokens that a row is to hold, prompt included.

    Returns:
      "prefill" and "step".

    Raises:
      ValueError: a size is wrong.
    """
    if not 1 <= prompt_length <= capacity:
        raise ValueError(
            f"prompt_length={prompt_length} must be at least 1 and at most capacity={capacity}."
        )
    if model.config.positions == "learned" and capacity > model.config.context_length:
        raise ValueError(
            f"capacity={capacity} must be at most {model.config.context_length}, the number of "
            "positions of positions='learned'."
        )
    # The one implementation whose programs JAX promises to keep.
    attention = dataclasses.replace(model.config.attention, implementation="xla")
    model = CausalLM(dataclasses.replace(model.config, attention=attention, remat=False))

    def prefill(params, tokens, lengths):
        empty = empty_cache(model.config, tokens.shape[0], capacity)
        variables = nested_parameters(params)
        logits, cache = model.apply(variables, tokens, lengths, empty, method="prefill")
        return logits, _as_dict(cache)

    def step(params, cache, tokens):
        logits, cache = model.apply(
            nested_parameters(params), tokens, _from_dict(cache), method="extend"
        )
        return logits, _as_dict(cache)

    (B,) = jax.export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct
    params = {name: shape(x.shape, x.dtype) for name, x in flat_parameters(variables).items()}
    prompts = params, shape((B, prompt_length), jnp.int32), shape((B,), jnp.int32)
    _, filled = jax.eval_shape(prefill, *prompts)
    export = lambda f: jax.export.export(jax.jit(f), platforms=PLATFORMS)  # noqa: E731
    return {
        "prefill": export(prefill)(*prompts),
        "step": export(step)(params, filled, shape((B, 1), jnp.int32)),
    }


def save_programs(folder: str | Path, programs: Mapping[str, jax.export.Exported]) -> list[Path]:
    """Writes each as NAME.jax_export, and run.py, which runs them with JAX and flatbuffers alone.

    Returns:
      The files.
    """
    folder = Path(folder)
    paths = []
    for name, program in programs.items():
        paths.append(folder / f"{name}.jax_export")
        with replacing(paths[-1]) as file:
            file.write(program.serialize())
    run = folder / "run.py"
    write_text(run, Path(__file__).with_name("standalone.py").read_text(encoding="utf-8"))
    return [*paths, run]


def _as_dict(cache: Any) -> dict[str, Any]:
    return {"layers": [layer._asdict() for layer in cache.layers], "lengths": cache.lengths}


def _from_dict(cache: Mapping[str, Any]) -> Cache:
    return Cache(tuple(KeysValues(**layer) for layer in cache["layers"]), cache["lengths"])
