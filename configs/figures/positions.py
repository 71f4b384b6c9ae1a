"""Positions {none, learned, RoPE, SuSiE, ALiBi} × {dot product, RBF}, and longer contexts.

After training each is evaluated at 1, 2, 4 and 8 times the length that it was trained at (learned
positions end at the first).

controls:   of longer contexts: the dot product of RBF's scale 2/√H and that with QK-norm, with
            SuSiE and RoPE. They say whether distances reach further, or logits of another size.
"""

from ml_collections import ConfigDict


def get_config(scale: str):
    """Returns what is trained; at the scale "smoke" evaluated at the first two lengths alone."""
    return ConfigDict(
        {
            "space": {
                # Trained first: the rest may be there from other figures.
                "controls": (
                    {"model.positions": ("susie", "rope")},
                    {
                        "model.attention.kind": ("dot", "dot"),
                        "model.attention.dot_scale": ("rbf", "standard"),
                        "model.attention.qk_norm": (False, True),
                    },
                ),
                "positions": (
                    {"model.positions": ("none", "learned", "rope", "susie", "alibi")},
                    {"model.attention.kind": ("rbf", "dot")},
                ),
            },
            "lengths": (1, 2) if scale == "smoke" else (1, 2, 4, 8),
        }
    )
