"""Verdicts follow the numbers."""

import copy

import pytest

from rbf_jax.analysis.claims import verdicts
from rbf_jax.analysis.claims.verdicts import HOLDS, IN_PART, NOT, OPEN


def estimate(mean, half=0.001, missing=0):
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": 4, "missing": missing}


def row(name, length, milliseconds=1.0, megabytes=1.0, runs_out=False):
    return {
        "implementation": name,
        "length": length,
        "direction": "forward+backward",
        "milliseconds": milliseconds,
        "temporary_bytes": megabytes * 2**20,
        "bytes_limit": 2**35,
        "error": None,
        "runs_out": runs_out,
    }


MEMORY = {
    "memory": [
        *(row("RBF reference", T, runs_out=T > 16_384) for T in (16_384, 32_768)),
        *(row("dot product, jax.nn xla", T, runs_out=T > 32_768) for T in (32_768, 65_536)),
        *(row("RBF xla", T, megabytes=T / 1024) for T in (32_768, 65_536)),
        *(row("RBF triton", T) for T in (32_768, 262_144)),
    ]
}
PROFILE = {
    "results": [
        *(row("dot product, cuDNN", T, 1.0) for T in (1024, 4096)),
        *(row("RBF xla", T, 12.0) for T in (1024, 4096)),
        *(row("RBF cudnn", T, 1.8) for T in (1024, 4096)),
        *(row("RBF triton", T, 1.2) for T in (1024, 4096)),
    ]
}
REGISTERS = {
    "base": {
        "spikes": estimate(0.0),
        "seeds": [0, 1, 2, 3],
        "first_token_mass": 0.1,
        "register_mass": 0.2,
    },
    "num_registers=0": {
        "spikes": estimate(0.0),
        "seeds": [0, 1, 2, 3],
        "first_token_mass": 0.3,
        "final_difference": estimate(0.0),
    },
}
POSITIONS = {
    "positions=rope": {"less_susie": estimate(0.05)},
    "kind=dot": {"less_rope": estimate(0.0)},
}
LAYER = {"device": "a CPU", "results": [row("RBF, RoPE", 512, 1.0), row("RBF, SuSiE", 512, 1.1)]}
CURVES = {
    "differences": {
        "base against kind=dot": {
            "final_difference": estimate(-0.02),
            "steps_saved": estimate(30, 5),
        },
        "base against dot_scale=rbf,kind=dot": {
            "final_difference": estimate(-0.02),
            "steps_saved": estimate(30, 5),
        },
        "base against kind=dot,qk_norm=True,positions=rope": {"final_difference": estimate(-0.02)},
        "base against kind=dot,positions=rope,register_init=normal": {
            "final_difference": estimate(-0.02)
        },
    }
}
LOWER = {"log_gradient_less_dot": estimate(-0.5), "log_gradient_less_matched": estimate(-0.5)}
STABILITY = {"base": LOWER, "kind=dot": {}}
SENSITIVITY = {"RBF": {"best_less_dot": estimate(-0.02)}}


def numbers(**changes):
    """Of all figures; a change is a number, by FIGURE__VARIANT__KEY."""
    found = copy.deepcopy(
        {
            "memory": MEMORY,
            "profile": PROFILE,
            "registers": REGISTERS,
            "positions": POSITIONS,
            "layer_profile": LAYER,
            "loss_curves": CURVES,
            "stability": STABILITY,
            "sensitivity": SENSITIVITY,
        }
    )
    for path, value in changes.items():
        *parts, last = path.split("__")
        section = found
        for part in parts:
            section = section[part]
        section[last] = value
    return found


def verdict(index, **changes):
    return verdicts.verdicts(numbers(**changes))[index].verdict


def test_memory_and_kernel():
    assert [v.verdict for v in verdicts.verdicts(numbers())[:3]] == [HOLDS, IN_PART, HOLDS]
    fast = [*PROFILE["results"][:2], *(row("RBF xla", T, 1.1) for T in (1024, 4096))]
    fast += [row("RBF triton", 1024, 1.0), row("RBF cudnn", 1024, 1.8)]
    assert verdict(2, profile__results=fast) == IN_PART
    square = [r for r in MEMORY["memory"] if r["implementation"] != "RBF xla"]
    square += [row("RBF xla", T, megabytes=(T / 4096) ** 2) for T in (32_768, 65_536)]
    (text,) = (verdicts.verdicts(numbers(memory__memory=square))[1].measured,)
    assert "T^2.00" in text
    never = [r for r in MEMORY["memory"] if r["implementation"] != "RBF reference"]
    assert verdict(0, memory__memory=never) == OPEN


def registers(**changes):
    return verdict(3, **{f"registers__num_registers=0__{k}": v for k, v in changes.items()})


def test_registers():
    assert registers() == NOT
    assert registers(final_difference=estimate(0.0, 0.05)) == OPEN
    assert registers(final_difference=estimate(0.03)) == IN_PART
    assert registers(spikes=estimate(5.0)) == IN_PART
    assert registers(spikes=estimate(0.0, missing=2)) == IN_PART
    assert registers(spikes=estimate(5.0), final_difference=estimate(0.03)) == HOLDS


def test_positions():
    assert verdict(4) == HOLDS
    assert verdict(
        4, layer_profile__results=[*LAYER["results"][:1], row("RBF, SuSiE", 512, 1.0)]
    ) == (IN_PART)
    assert verdict(4, **{"positions__positions=rope__less_susie": estimate(-0.05)}) == NOT
    assert verdict(4, **{"positions__positions=rope__less_susie": estimate(0.0, 0.05)}) == OPEN


def early(loss, gradient, matched=None, gradient_matched=None):
    against = "loss_curves__differences__base against"
    return verdict(
        5,
        **{
            f"{against} kind=dot__final_difference": loss,
            f"{against} dot_scale=rbf,kind=dot__final_difference": matched or loss,
            "stability__base__log_gradient_less_dot": gradient,
            "stability__base__log_gradient_less_matched": gradient_matched or gradient,
        },
    )


def test_early_gradients():
    lower, higher, unclear = estimate(-0.5), estimate(0.5), estimate(0.0, 1.0)
    assert early(estimate(-0.02), lower) == HOLDS
    # By the scale alone.
    assert early(estimate(-0.02), lower, gradient_matched=unclear) == IN_PART
    assert early(estimate(0.0, 0.05), lower, gradient_matched=unclear) == OPEN
    assert early(estimate(0.0, 0.05), lower) == IN_PART
    assert early(estimate(-0.02), higher) == IN_PART
    assert early(estimate(-0.02), unclear, matched=estimate(0.0, 0.05)) == OPEN
    assert early(estimate(0.02), unclear) == NOT
    assert early(estimate(0.0, 0.05), unclear) == OPEN


def test_overall():
    # docs/measurements/bench_training_gpu.json: RBF's training step is not slower.
    assert verdict(6) == NOT
    assert verdict(6, sensitivity__RBF__best_less_dot=estimate(0.0, 0.05)) == OPEN
    assert verdict(6, sensitivity__RBF__best_less_dot=estimate(0.02)) == HOLDS
    twins = "loss_curves__differences__base against kind=dot,positions=rope,register_init=normal"
    assert verdict(6, **{f"{twins}__final_difference": estimate(0.0, 0.05)}) == OPEN
    normed = "loss_curves__differences__base against kind=dot,qk_norm=True,positions=rope"
    for worse in (twins, normed):
        assert verdict(6, **{f"{worse}__final_difference": estimate(0.02)}) == HOLDS
    nothing = {f"{name}__final_difference": estimate(0.0) for name in (twins, normed)}
    assert verdict(6, sensitivity__RBF__best_less_dot=estimate(0.0), **nothing) == IN_PART


def test_what_was_not_measured_is_not_decided():
    found = verdicts.verdicts({"memory": MEMORY})
    assert [v.verdict for v in found] == [HOLDS, *[OPEN] * 6]
    assert found[3].measured == "not measured: no registers"
    lost = numbers()
    lost["sensitivity"]["RBF"]["best_less_dot"]["n"] = 0
    assert verdicts.verdicts(lost)[6].verdict == OPEN


def test_tables():
    found = verdicts.verdicts(numbers())
    long, short = verdicts.table(found, "figures/"), verdicts.short_table(found)
    assert len(long.splitlines()) == len(short.splitlines()) == 2 + len(found)
    assert "**holds**" in long
    assert "[memory](figures/memory.png)" in long
    assert all(v.claim in short for v in found)


@pytest.mark.parametrize("field", ["mean", "low", "high"])
def test_what_is_quoted_is_what_was_measured(field):
    value = estimate(0.1234, 0.05)
    text = verdicts.verdicts(numbers(sensitivity__RBF__best_less_dot=value))[6].measured
    assert f"{value[field]:+.4f}" in text
