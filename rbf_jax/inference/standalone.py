"""Runs an exported model, whose folder this file lies in, with JAX and `flatbuffers` alone.

    python run.py TOKEN,TOKEN,... [TOKEN,TOKEN,... ...] [--tokens=N]

Each argument is a prompt, as the numbers of its tokens. Prints the N likeliest tokens (20 unless
given) to follow each, one by one; one line a prompt.
"""

import argparse
import json
import struct
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np


def read_parameters(path):
    """Reads a file of safetensors: eight bytes, the length of a JSON header; header; arrays."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    parameters = {}
    for name, entry in json.loads(content[8 : 8 + size]).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "F32":
            raise ValueError(f"{name} in {path} has dtype {entry['dtype']}, but must be F32.")
        start, end = (8 + size + offset for offset in entry["data_offsets"])
        array = np.frombuffer(content[start:end], "<f4").reshape(entry["shape"])
        parameters[name] = jnp.asarray(array)
    return parameters


def read_program(path, **options):
    """Reads what `jax.export` wrote; it is compiled when first called."""
    return jax.jit(jax.export.deserialize(bytearray(path.read_bytes())).call, **options)


def check(config, prompts, num_tokens):
    """Raises ValueError for what the programs would answer with nonsense."""
    width, capacity = config["about"]["prompt_length"], config["about"]["capacity"]
    longest = max(map(len, prompts))
    if longest > width:
        raise ValueError(f"a prompt has {longest} tokens; the program takes at most {width}.")
    # The last token is not read again, and takes no place.
    most = capacity - longest + 1
    if not 1 <= num_tokens <= most:
        raise ValueError(
            f"--tokens={num_tokens} must be at least 1 and at most {most}: the program holds "
            f"{capacity} tokens, the prompt's {longest} among them."
        )
    vocab_size = config["model"]["vocab_size"]
    for token in (token for prompt in prompts for token in prompt):
        if not 0 <= token < vocab_size:
            raise ValueError(f"token {token} must be at least 0 and less than {vocab_size}.")


def continuations(folder, prompts, num_tokens):
    """Returns the `num_tokens` likeliest tokens, one after another, to follow each prompt."""
    config = json.loads((folder / "config.json").read_text())
    check(config, prompts, num_tokens)
    parameters = read_parameters(folder / "model.safetensors")
    prefill = read_program(folder / "prefill.jax_export")
    # The cache is given away: the step then writes into it, and copies nothing.
    step = read_program(folder / "step.jax_export", donate_argnums=1)
    tokens = np.zeros((len(prompts), config["about"]["prompt_length"]), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    logits, cache = prefill(parameters, tokens, lengths)
    found = []
    for _ in range(num_tokens):
        found.append(jnp.argmax(logits, axis=-1).astype(jnp.int32))
        logits, cache = step(parameters, cache, found[-1][:, None])
        logits = logits[:, 0]
    return np.stack(found, axis=1)


def numbers(text):
    """Reads TOKEN,TOKEN,..."""
    try:
        return [int(token) for token in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be the numbers of tokens, separated by commas"
        ) from error


def main():
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prompts", nargs="+", type=numbers, metavar="TOKEN,TOKEN,...")
    parser.add_argument("--tokens", type=int, default=20, metavar="N")
    arguments = parser.parse_args()
    try:
        rows = continuations(Path(__file__).parent, arguments.prompts, arguments.tokens)
    except (ValueError, ImportError) as error:  # JAX reads programs by flatbuffers
        parser.error(str(error))
    for row in rows:
        print(",".join(map(str, row)))


if __name__ == "__main__":
    sys.exit(main())
