"""What each part of the model does: a union of small grids around the demo's RBF model, 4 seeds.

positions:  none, learned, RoPE, SuSiE, ALiBi × dot product, RBF
registers:  0, 1, 4, started at zero or at random × without and with a virtual key at the origin
norms:      λ, the weight of the key norms, from 0 (dot product) to 1 (RBF), fixed
scale:      γ over its default 1/√H from 1/4 to 4, fixed
learned:    λ and γ, each fixed or learned

Command:  python -m experiments.sweep --config=configs/sweeps/ablation.py
          The sizes of the original experiment, on GPUs: --config.base=configs/stories_rbf.py; the
          heads there are 64 wide, so the grid "scale" then goes from √2/4 to 4√2 of the default.
Hardware: 2 CPU cores, or any number of GPUs.
Time:     75 seconds a trial on 2 CPU cores, by the time that configs/demo.py takes; the sweep is
          not measured at full length.
"""

from configs.sweeps import base

# The default of the demo's heads, which are 32 wide.
_GAMMA = 32**-0.5


def get_config():
    """Returns the sweep."""
    config = base.get_config()
    config.base = "configs/demo.py:rbf"
    config.space = {
        "positions": (
            {"model.positions": ("none", "learned", "rope", "susie", "alibi")},
            {"model.attention.kind": ("rbf", "dot")},
        ),
        "registers": (
            {
                "model.attention.sink": ("none", *("register",) * 4, *("origin",) * 5),
                "model.num_registers": (None, None, 4, None, 4, None, 1, 4, 1, 4),
                "model.register_init": ("zero", "zero", "zero", "normal", "normal") * 2,
            },
        ),
        "norms": ({"model.attention.key_norm_weight": (0.0, 0.25, 0.5, 0.75, 1.0)},),
        "scale": (
            {"model.attention.gamma": tuple(_GAMMA * x for x in (0.25, 0.5, 1.0, 2.0, 4.0))},
        ),
        "learned": (
            {"model.attention.learn_key_norm_weight": (False, True)},
            {"model.attention.learn_gamma": (False, True)},
        ),
    }
    config.seeds = 4
    return config
