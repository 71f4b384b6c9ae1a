"""RBF attention against dot products: the original's twins, and the same with all else equal.

twins:    as in the original experiment, each with what suits it: RBF with SuSiE and a register at
          the origin, dot product with RoPE and a small random register.
kinds:    RBF, dot product at its usual scale 1/√H, at RBF's 2/√H, and both with QK-norm; with the
          same positions (SuSiE, RoPE) and the same register.
"""

from ml_collections import ConfigDict


def get_config(scale: str):
    """Returns what is trained; the same at every scale."""
    del scale
    kinds = {
        "model.attention.kind": ("rbf", "dot", "dot", "dot", "rbf"),
        "model.attention.dot_scale": ("standard", "standard", "rbf", "standard", "standard"),
        "model.attention.qk_norm": (False, False, False, True, True),
    }
    return ConfigDict(
        {
            "space": {
                "twins": (
                    {
                        "model.attention.kind": ("rbf", "dot"),
                        "model.positions": ("susie", "rope"),
                        "model.register_init": ("zero", "normal"),
                    },
                ),
                "kinds": ({"model.positions": ("susie", "rope")}, kinds),
            },
            "lengths": (),
        }
    )
