"""Register tokens and the sink at the origin: what happens without, and how they start.

rbf:  0, 1 and 4 registers, started at zero or at random, without and with the origin sink.
dot:  the same of 0 and 1 for the dot product with RoPE, to compare.
"""

from ml_collections import ConfigDict


def get_config(scale: str):
    """Returns what is trained; at the scale "smoke" without the sink, and 4 start at zero only."""
    starts = ("zero", "zero", "normal", "zero", "normal")[: 4 if scale == "smoke" else 5]
    sinks = (False,) if scale == "smoke" else (False, True)
    return ConfigDict(
        {
            "space": {
                "rbf": (
                    {
                        "model.num_registers": (0, 1, 1, 4, 4)[: len(starts)],
                        "model.register_init": starts,
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
            "lengths": (),
        }
    )
