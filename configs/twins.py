"""The two sides of the comparison, in one place so that they differ nowhere else."""

from ml_collections import ConfigDict


def twin(config: ConfigDict, variant: str) -> ConfigDict:
    """Makes `config` one of the twins, in place, and returns it.

    Each has what suits it, as in the original experiment. RBF attention: SuSiE positions, which are
    added to queries and keys as distances want it, and a register that starts at the origin, where
    a query with nothing to look at can go. Dot-product attention: its usual scale 1/√H, RoPE, and
    a small random register.

    Args:
      config: everything else.
      variant: "rbf" or "dot".

    Raises:
      ValueError: there is no such variant.
    """
    if variant == "rbf":
        config.model.attention.kind = "rbf"
        config.model.positions = "susie"
        config.model.register_init = "zero"
    elif variant == "dot":
        config.model.attention.kind = "dot"
        config.model.positions = "rope"
        config.model.register_init = "normal"
    else:
        raise ValueError(f"the variant is {variant!r}; it must be 'rbf' or 'dot'.")
    return config
