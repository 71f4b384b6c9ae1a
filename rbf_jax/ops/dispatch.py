"""Which implementation does a call: the one asked for by name, or the best that can.

An implementation asked for by name never falls back. ``None`` takes the first in the order of
`_order` that supports the call, where the program is compiled for CUDA, and "xla" elsewhere.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax

from rbf_jax.ops import call, cudnn, reference, xla
from rbf_jax.ops.call import Inputs, Masking, Rules
from rbf_jax.ops.gpu.mosaic import passes as mosaic
from rbf_jax.ops.gpu.triton import passes as triton
from rbf_jax.ops.parallel import mesh
from rbf_jax.ops.vjp import Passes, with_custom_vjp

_logger = logging.getLogger("rbf_jax")

Name = Literal["reference", "xla", "cudnn", "triton", "mosaic"]

# The shortest sequences, in tokens, at which benchmarks found Mosaic faster than Triton, by dtype
# and head dimension (docs/speed.md). Others were not measured.
_MOSAIC_FROM = {
    ("bfloat16", 64): 512,
    ("bfloat16", 128): 512,
    ("float16", 64): 4096,
    ("float16", 128): 4096,
}


class Implementation(NamedTuple):
    """One way to do a call.

    Attributes:
      attend: returns the output and the logsumexp, None where it has none.
      supports: names of the `Rules` and `Masking` fields that it takes; it refuses all others.
      unsupported: why it cannot do a call for another reason, as the rest of a sentence, or None.
      passes: what a mesh takes apart to split the call; None where it cannot.
    """

    attend: Callable[[Inputs, Masking, Rules], tuple[jax.Array, jax.Array | None]]
    supports: frozenset[str]
    unsupported: Callable[[Inputs, Rules], str | None] = lambda inputs, rules: None
    passes: Passes | None = None

    def refusal(self, inputs: Inputs, masking: Masking, rules: Rules) -> str | None:
        """Returns why it cannot do the call, as the rest of a sentence, or None if it can."""
        reason = self.unsupported(inputs, rules)
        return reason or call.unsupported(rules, masking, self.supports)

    def run(self, inputs: Inputs, masking: Masking, rules: Rules):
        """Does the call; each device of a mesh that is set does its part.

        Returns the output and, if `rules.return_residual`, the logsumexp, else None.
        """
        split = None if self.passes is None else mesh.split_of(inputs, rules)
        if self.passes is None or split is None:
            out, logsumexp = self.attend(inputs, masking, rules)
        else:
            out, logsumexp = mesh.attend(self.passes, split, inputs, masking, rules)
        return out, logsumexp if rules.return_residual else None


def _with_passes(module) -> Implementation:
    attend = with_custom_vjp(module.PASSES)
    return Implementation(attend, module.SUPPORTS, module.unsupported, module.PASSES)


ATTENTION: dict[str, Implementation] = {
    "triton": _with_passes(triton),
    "mosaic": _with_passes(mosaic),
    "cudnn": Implementation(cudnn.attend, cudnn.SUPPORTS, cudnn.unsupported),
    "xla": Implementation(with_custom_vjp(xla.PASSES), xla.SUPPORTS, passes=xla.PASSES),
    "reference": Implementation(reference.attend, reference.SUPPORTS),
}


def attend(
    implementation: str | None,
    inputs: Inputs,
    masking: Masking,
    rules: Rules,
    table: Mapping[str, Implementation] = ATTENTION,
) -> tuple[jax.Array, jax.Array | None]:
    """Does a call that validate.py has checked.

    Args:
      implementation: a name in `table`, or None.
      inputs: of the call.
      masking: of the call.
      rules: of the call.
      table: the implementations to choose from.

    Returns:
      The output and, if `rules.return_residual`, the logsumexp, else None.

    Raises:
      ValueError: no implementation has this name.
      NotImplementedError: the one asked for cannot do this call.
    """
    if implementation is not None:
        _require(implementation, inputs, masking, rules, table)
        return table[implementation].run(inputs, masking, rules)
    name = _best(inputs, masking, rules, table)
    if name == "xla":
        return table[name].run(inputs, masking, rules)
    # The program may yet be placed on the CPU (jax.default_device), where CUDA is not.
    return jax.lax.platform_dependent(
        inputs,
        masking,
        cuda=functools.partial(table[name].run, rules=rules),
        default=functools.partial(table["xla"].run, rules=rules),
    )


def _require(name, inputs, masking, rules, table) -> None:
    """Raises unless the implementation asked for exists and can do the call."""
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"implementation={name!r} must be None or one of {sorted(table)}.")
    reason = table[name].refusal(inputs, masking, rules)
    if reason is not None:
        refusals = {name: x.refusal(inputs, masking, rules) for name, x in table.items()}
        able = [repr(name) for name, refusal in refusals.items() if refusal is None]
        raise NotImplementedError(
            f"implementation={name!r} {reason}; {' and '.join(able) or 'none'} can do this call."
        )


def _best(inputs, masking, rules, table) -> str:
    """The first in the order that supports the call, else "xla", which supports all."""
    operation = "rbf_attention" if table is ATTENTION else "decode.attend"
    refused = []
    for name in _order(inputs, rules) if table is ATTENTION else ["triton"]:
        reason = table[name].refusal(inputs, masking, rules)
        if reason is None:
            _log_choice(
                operation, f"takes {name!r} where the program is compiled for CUDA, else 'xla'"
            )
            return name
        refused.append(f"{name!r} {reason}")
    _log_choice(operation, f"takes 'xla': {'; '.join(refused)}")
    return "xla"


def _order(inputs: Inputs, rules: Rules) -> list[str]:
    """Mosaic where benchmarks found it faster; for the dot product cuDNN, which is made for it."""
    shortest = _MOSAIC_FROM.get((inputs.query.dtype.name, inputs.query.shape[-1]))
    names = ["triton"]
    if shortest is not None and min(mesh.lengths_at_once(inputs, rules)) >= shortest:
        names = ["mosaic", "triton"] if jax.__version__ in mosaic.MEASURED_ON else names
    return ["cudnn", *names] if rules.static_key_norm_weight == 0 else names


@functools.cache
def _log_choice(operation: str, choice: str) -> None:
    _logger.info("%s: implementation=None %s.", operation, choice)
