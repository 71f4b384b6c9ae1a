"""The dial from dot product to RBF: λ fixed from 0 to 1, λ learned, γ learned per head."""

from ml_collections import ConfigDict


def get_config(scale: str):
    """Returns what is trained; λ = 0 and 1 alone, and less learned, at the scale "smoke"."""
    weights = (0.0, 1.0) if scale == "smoke" else (0.0, 0.25, 0.5, 0.75, 1.0)
    learned: dict[str, tuple] = {
        "model.attention.key_norm_weight": (0.0, 1.0, 1.0, 1.0),
        "model.attention.learn_key_norm_weight": (True, True, False, True),
        "model.attention.learn_gamma": (False, False, True, True),
    }
    if scale == "smoke":
        learned = {name: values[::3] for name, values in learned.items()}
    return ConfigDict(
        {
            "space": {
                "fixed": ({"model.attention.key_norm_weight": weights},),
                "learned": (learned,),
            },
            "lengths": (),
        }
    )
