"""Verdicts follow the numbers."""

import copy
import json

import pytest

from rbf_jax.analysis.claims import judges, verdicts
from rbf_jax.analysis.claims.rules import HOLDS, IN_PART, NOT, OPEN


def estimate(mean, half=0.001, missing=0):
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": 4, "missing": missing}


def row(
    name, length, milliseconds=1.0, megabytes=1.0, runs_out=False, direction="forward+backward"
):
    return {
        "implementation": name,
        "length": length,
        "direction": direction,
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
    "device": "GPU",
    "results": [
        *(row("dot product, cuDNN", T, 1.0) for T in (1024, 4096)),
        *(row("RBF xla", T, 12.0, 80.0) for T in (1024, 4096)),
        *(row("RBF cudnn", T, 1.8, 40.0) for T in (1024, 4096)),
        *(row("RBF triton", T, 1.2) for T in (1024, 4096)),
    ],
}
REGISTERS = {
    "base": {
        "spikes": estimate(0.0),
        "seeds": [0, 1, 2, 3],
        "first_token_mass": 0.1,
        "even_share": 0.02,
        "register_mass": 0.2,
    },
    "sink=none": {
        "spikes": estimate(0.0),
        "seeds": [0, 1, 2, 3],
        "first_token_mass": 0.3,
        "even_share": 0.03,
        "final_difference": estimate(0.0),
        "spikes_difference": estimate(0.0),
    },
}
POSITIONS = {
    "positions=rope": {"less_susie": estimate(0.05)},
    "kind=dot": {"less_rope": estimate(0.0)},
}


def layer(forward, both):
    times = {"forward": forward, "forward+backward": both}
    rows = [row("RBF, SuSiE", 512, times[d], direction=d) for d in times]
    return [*rows, *(row("RBF, RoPE", 512, 1.0, direction=d) for d in times)]


LAYER = {"device": "a CPU", "results": layer(1.05, 1.1)}
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
SENSITIVITY = {
    "RBF": {
        "best_less": {
            "dot product": estimate(-0.02),
            "dot product, RBF's scale": estimate(-0.02),
            "dot product + QK-norm": estimate(-0.02),
        },
        "by_rate": {"0.001": 2.0, "0.003": 1.5},
    },
    "RBF + QK-norm": {"best_less": {"dot product + QK-norm": estimate(0.03)}},
}


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
    assert [v.verdict for v in verdicts.verdicts(numbers())[:2]] == [HOLDS, IN_PART]
    square = [r for r in MEMORY["memory"] if r["implementation"] != "RBF xla"]
    square += [row("RBF xla", T, megabytes=(T / 4096) ** 2) for T in (32_768, 65_536)]
    (text,) = (verdicts.verdicts(numbers(memory__memory=square))[1].measured,)
    assert "T^2.00" in text
    never = [r for r in MEMORY["memory"] if r["implementation"] != "RBF reference"]
    assert verdict(0, memory__memory=never) == OPEN


def hopper(forward, both):
    cells = [{"length": T, "causal": causal} for T in (4096, 16_384) for causal in (True, False)]
    times = {
        "dot product, cuDNN": {"forward": [1.0] * 4, "forward+backward": [1.0] * 4},
        "RBF mosaic": {"forward": forward, "forward+backward": both},
    }
    return [
        {**cell, "implementation": name, "direction": direction, "milliseconds": milliseconds}
        for name, by_direction in times.items()
        for direction, found in by_direction.items()
        for cell, milliseconds in zip(cells, found, strict=True)
    ]


def test_the_fastest_kernel_counts_beside_the_reformulation_by_xla(tmp_path, monkeypatch):
    files = (tmp_path / "of_64.json", tmp_path / "of_128.json")
    monkeypatch.setattr(judges, "HOPPER", files)
    cpu = [row("rbf xla", 512, 2.0), row("dot, jax.nn xla", 512, 1.0)]
    monkeypatch.setattr(judges, "CPU", tmp_path / "cpu.json")
    judges.CPU.write_text(json.dumps({"results": cpu}))

    def judged(both):
        for path in files:
            path.write_text(json.dumps({"results": hopper([0.75, 0.8, 0.9, 1.05], both)}))
        _, reformulated, kernel, *_ = verdicts.verdicts(numbers())
        assert "0.75 to 1.05 times as long as cuDNN's dot product forward" in reformulated.measured
        assert "(8 cells of H, T, causal or full)" in kernel.measured
        return reformulated

    # Slower by XLA alone, on a GPU and on a CPU.
    assert judged([1.1, 1.2, 1.3, 1.4]).verdict == HOLDS
    assert judged([0.6, 0.7, 0.8, 0.9]).verdict == IN_PART
    undecided = judged([0.9, 1.0, 1.1, 1.2])
    assert undecided.verdict == OPEN
    assert "0.90 to 1.20 times forward + backward" in undecided.measured


def kernel(folded_time, folded_megabytes, xla_time=12.0, xla_megabytes=80.0):
    rows = [*PROFILE["results"][:2], row("RBF triton", 1024, 1.0), row("RBF triton", 4096, 1.0)]
    rows += [row("RBF xla", T, xla_time, xla_megabytes) for T in (1024, 4096)]
    rows += [row("RBF cudnn", T, folded_time, folded_megabytes) for T in (1024, 4096)]
    return verdict(2, profile__results=rows)


def test_the_kernel_is_judged_by_time_and_memory_and_never_by_expertise():
    # All that is measured speaks for it; expertise is not measured.
    assert kernel(1.8, 40) == IN_PART
    assert "Expertise is not measured" in verdicts.verdicts(numbers())[2].measured
    assert kernel(1.0, 40) == IN_PART
    assert kernel(1.0, 1.0, xla_time=1.1, xla_megabytes=1.1) == NOT
    text = verdicts.verdicts(numbers())[2].measured
    assert "takes 10.00 times the kernel's time and 80 times its memory" in text
    assert "1.50 times the kernel's time and 40 times its memory" in text


def registers(**changes):
    return verdict(3, **{f"registers__sink=none__{k}": v for k, v in changes.items()})


def test_registers():
    assert registers() == NOT
    assert registers(final_difference=estimate(0.0, 0.05)) == OPEN
    # Clearly above 0, but not above what counts.
    assert registers(final_difference=estimate(0.0105)) == OPEN
    assert registers(final_difference=estimate(0.005)) == NOT
    assert registers(final_difference=estimate(0.03)) == IN_PART
    assert registers(spikes_difference=estimate(5.0)) == IN_PART
    assert registers(spikes_difference=estimate(5.0, 4.5)) == OPEN
    assert registers(spikes=estimate(0.0, missing=2)) == IN_PART
    assert registers(spikes_difference=estimate(5.0), final_difference=estimate(0.03)) == HOLDS
    text = verdicts.verdicts(numbers())[3].measured
    assert "takes 30.0% of the attention (an even share: 3.0%) against 10.0% (2.0%)" in text


def test_positions():
    assert verdict(4) == HOLDS
    cheap = layer(1.0, 1.0)
    assert verdict(4, layer_profile__results=cheap) == IN_PART
    rope = "positions__positions=rope__less_susie"
    assert verdict(4, **{rope: estimate(-0.05)}) == IN_PART
    assert verdict(4, **{rope: estimate(-0.05)}, layer_profile__results=cheap) == NOT
    assert verdict(4, **{rope: estimate(0.0, 0.05)}) == OPEN
    # Slower both ways, faster forward alone: a cost that is not known.
    mixed = {"layer_profile__results": layer(0.9, 1.1)}
    assert verdict(4, **mixed) == verdict(4, **{rope: estimate(-0.05)}, **mixed) == OPEN
    text = verdicts.verdicts(numbers(**mixed))[4].measured
    assert "takes 0.90 times as long as with RoPE forward, and 1.10 times forward + b" in text


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
    # By the scale alone: refuted against the dot product of that scale.
    assert early(estimate(-0.02), lower, gradient_matched=estimate(0.0)) == IN_PART
    assert early(estimate(-0.02), lower, gradient_matched=unclear) == OPEN
    assert early(estimate(0.0, 0.05), lower) == OPEN
    assert early(estimate(0.0), lower) == IN_PART
    assert early(estimate(-0.02), higher) == IN_PART
    assert early(estimate(-0.02), unclear, matched=estimate(0.0, 0.05)) == OPEN
    assert early(estimate(0.02), higher) == NOT
    assert early(estimate(-0.005), higher) == NOT
    assert early(estimate(0.02), unclear) == OPEN


BEST = "sensitivity__RBF__best_less"
ONE_RATE = "loss_curves__differences__base against kind=dot"
COMPARED = (
    *(f"{BEST}__dot product{suffix}" for suffix in ("", ", RBF's scale", " + QK-norm")),
    f"{ONE_RATE},positions=rope,register_init=normal__final_difference",
    f"{ONE_RATE},qk_norm=True,positions=rope__final_difference",
)


def test_overall():
    # docs/measurements/bench_training_gpu.json: RBF's training step is not slower.
    assert verdict(6) == NOT
    for name in COMPARED:
        assert verdict(6, **{name: estimate(0.02)}) == IN_PART
        assert verdict(6, **{name: estimate(-0.005)}) == IN_PART
        assert verdict(6, **{name: estimate(-0.02, 0.03)}) == OPEN
    # Nothing is gained, and nothing lost in speed.
    assert verdict(6, **{name: estimate(0.0) for name in COMPARED}) == IN_PART


def test_overall_says_at_which_rates():
    text = verdicts.verdicts(numbers())[6].measured
    assert "each at the best of 2 learning rates" in text
    assert "with RoPE, trained at one learning rate alone, " in text
    one = numbers(sensitivity__RBF__by_rate={"0.001": 2.0})
    assert "SuSiE for all, at one learning rate: " in verdicts.verdicts(one)[6].measured


def differences(**final):
    """Of `loss_curves`, at one learning rate, with gradients that are not lower."""
    names = ("base against kind=dot", "base against dot_scale=rbf,kind=dot")
    names += ("base against kind=dot,qk_norm=True", "qk_norm=True against kind=dot,qk_norm=True")
    names += ("base against kind=dot,positions=rope,register_init=normal",)
    names += ("base against kind=dot,qk_norm=True,positions=rope", "positions=rope against base")
    names += ("kind=dot against kind=dot,positions=rope",)
    return {
        "differences": {
            name: {
                "final_difference": final.get(name, estimate(-0.02)),
                "steps_saved": estimate(30, 5),
                "log_gradient_norm": estimate(0.1),
            }
            for name in names
        }
    }


def test_a_text_with_the_curves_alone_is_judged_at_one_rate():
    found = verdicts.at_one_rate(differences(), LAYER)
    assert [v.claim for v in found] == [claim for claim, *_ in verdicts.CLAIMS[4:]]
    assert [v.verdict for v in found] == [IN_PART, IN_PART, NOT]
    assert {v.figures for v in found} == {("loss_curves",)}
    assert all("not measured" not in v.measured for v in found)
    changes = {"base against kind=dot,qk_norm=True": estimate(0.02)}
    changes |= {"positions=rope against base": estimate(0.05)}
    assert [v.verdict for v in verdicts.at_one_rate(differences(**changes), LAYER)] == [
        HOLDS,
        IN_PART,
        IN_PART,
    ]
    # Without a variant, or the layer's times, nothing is decided.
    some = differences()
    del some["differences"]["base against dot_scale=rbf,kind=dot"]
    assert [v.verdict for v in verdicts.at_one_rate(some, None)] == [OPEN] * 3


def test_what_was_not_measured_is_not_decided():
    found = verdicts.verdicts({"memory": MEMORY})
    assert [v.verdict for v in found] == [HOLDS, *[OPEN] * 6]
    assert found[3].measured == "not measured: no registers"
    lost = numbers()
    lost["sensitivity"]["RBF"]["best_less"]["dot product"]["n"] = 0
    assert verdicts.verdicts(lost)[6].verdict == OPEN


def test_tables():
    found = verdicts.verdicts(numbers())
    other = verdicts.at_one_rate(differences(), LAYER)
    long = verdicts.table(found, "figures/")
    short = verdicts.short_table(found, {"another text": other})
    assert len(long.splitlines()) == len(short.splitlines()) == 2 + len(found)
    assert short.splitlines()[0] == "| the article says | verdict | another text |"
    assert short.splitlines()[2].endswith(f"| {HOLDS} | – |")
    assert short.splitlines()[-1].endswith(f"| {NOT} | {NOT} |")
    assert "**holds**" in long
    assert "[memory](figures/memory.png)" in long
    assert all(v.claim in short for v in found)


@pytest.mark.parametrize("field", ["mean", "low", "high"])
def test_what_is_quoted_is_what_was_measured(field):
    value = estimate(0.1234, 0.05)
    text = verdicts.verdicts(numbers(**{f"{BEST}__dot product": value}))[6].measured
    assert f"{value[field]:+.4f}" in text
