"""Register tokens and the sink at the origin: what happens without, and how they start.

rbf:  0, 1 and 4 registers, started at zero or at random, without and with the origin sink.
dot:  the same of 0 and 1 for the dot product with RoPE, to compare.
"""

from ml_collections import ConfigDict


def get_config(scale: str):
    """Returns what is trained; without the product with the sink at the scale "smoke"."""
    sinks = (False,) if scale == "smoke" else (False, True)
    return ConfigDict(
        {
            "space": {
                "rbf": (
                    {
                        "model.num_registers": (0, 1, 1, 4, 4),
                        "model.register_init": ("zero", "zero", "normal", "zero", "normal"),
                    },
                    {"model.attention.origin_sink": sinks},
                ),
                "dot": (
                    {"model.attention.kind": ("dot",)},
                    {"model.positions": ("rope",)},
                    {
                        "model.num_registers": (0, 1, 1),
                        "model.register_init": ("zero", "zero", "normal"),
                    },
                ),
            },
            "lengths": False,
        }
    )
