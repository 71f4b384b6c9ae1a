"""Seconds, for tests and for trying sweeps out: 2 learning rates × 2 kinds of attention.

Command:  python -m experiments.sweep --config=configs/sweeps/smoke.py
Hardware: any CPU.
"""

from configs.sweeps import base


def get_config():
    """Returns the sweep."""
    config = base.get_config()
    config.base = "configs/smoke.py"
    config.space = (
        {"optimizer.learning_rate": (1e-3, 1e-2)},
        {"model.attention.kind": ("rbf", "dot")},
        {"logging.tensorboard": (False,)},
    )
    return config
