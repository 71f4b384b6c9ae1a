"""Register tokens and the sink at the origin: what happens without, and how they start.

rbf:  0, 1 and 4 registers, started at zero or at random, without and with the origin sink.
dot:  the same of 0 and 1 for the dot product with RoPE, to compare.
"""

from ml_collections import ConfigDict

# Sink, number of registers (None: the sink's own), and how they start.
_RBF = (
    ("none", None, "zero"),
    ("origin", None, "zero"),
    ("register", None, "zero"),
    ("origin", 1, "zero"),
    ("register", None, "normal"),
    ("origin", 1, "normal"),
    ("register", 4, "zero"),
    ("origin", 4, "zero"),
    ("register", 4, "normal"),
    ("origin", 4, "normal"),
)


def get_config(scale: str):
    """Returns what is trained; at the scale "smoke" without the sink, and 4 start at zero only."""
    rows = [row for row in _RBF if row[0] != "origin"][:4] if scale == "smoke" else _RBF
    sinks, numbers, starts = zip(*rows)
    return ConfigDict(
        {
            "space": {
                "rbf": (
                    {
                        "model.attention.sink": sinks,
                        "model.num_registers": numbers,
                        "model.register_init": starts,
                    },
                ),
                "dot": (
                    {"model.attention.kind": ("dot",)},
                    {"model.positions": ("rope",)},
                    {
                        "model.attention.sink": ("none", "register", "register"),
                        "model.register_init": ("zero", "zero", "normal"),
                    },
                ),
            },
            "lengths": (),
        }
    )
