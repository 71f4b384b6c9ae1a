"""Positions {none, learned, RoPE, SuSiE, ALiBi} × {dot product, RBF}, and longer contexts.

After training each is evaluated at 1, 2, 4 and 8 times the length that it was trained at (learned
positions end at the first).
"""

from ml_collections import ConfigDict


def get_config(scale: str):
    """Returns what is trained; the same at every scale."""
    del scale
    return ConfigDict(
        {
            "space": {
                "positions": (
                    {"model.positions": ("none", "learned", "rope", "susie", "alibi")},
                    {"model.attention.kind": ("rbf", "dot")},
                )
            },
            "lengths": True,
        }
    )
