"""Learning rate × attention: first steps, spikes, and how sensitive the end is.

The same grid for all, SuSiE positions and a register at the origin for all; the last learning rate
is 1 % of the first.
"""

from ml_collections import ConfigDict

_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def get_config(scale: str):
    """Returns what is trained; one learning rate at the scale "smoke"."""
    rates = _RATES[1:2] if scale == "smoke" else _RATES
    return ConfigDict(
        {
            "space": {
                "learning_rate": (
                    {
                        "optimizer.learning_rate": rates,
                        "optimizer.final_learning_rate": tuple(0.01 * rate for rate in rates),
                    },
                    {
                        "model.attention.kind": ("rbf", "dot", "dot", "dot", "rbf"),
                        "model.attention.dot_scale": (
                            "standard",
                            "standard",
                            "rbf",
                            "standard",
                            "standard",
                        ),
                        "model.attention.qk_norm": (False, False, False, True, True),
                    },
                )
            },
            "lengths": (),
        }
    )
