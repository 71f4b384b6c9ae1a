"""How sensitive RBF and dot-product attention are to the learning rate; all else equal.

7 learning rates × (RBF, dot product, dot product with QK-norm) × 4 seeds = 84 trials.

Command:  python -m experiments.sweep --config=configs/sweeps/learning_rate.py
          The sizes of the original experiment, on GPUs: --config.base=configs/stories_rbf.py
Hardware: 2 CPU cores, or any number of GPUs.
Time:     75 seconds a trial on 2 CPU cores, by the time that configs/demo.py takes; the sweep is
          not measured at full length.
"""

from configs.sweeps import base


def get_config():
    """Returns the sweep."""
    config = base.get_config()
    config.base = "configs/demo.py:rbf"
    config.space = (
        {"optimizer.learning_rate": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)},
        {
            "model.attention.kind": ("rbf", "dot", "dot"),
            "model.attention.qk_norm": (False, False, True),
        },
        # One for all: what suits neither kind in particular, so that attention alone differs.
        {"model.positions": ("rope",)},
        {"model.attention.sink": ("register",)},
        {"optimizer.final_learning_rate": (3e-5,)},
    )
    config.seeds = 4
    return config
