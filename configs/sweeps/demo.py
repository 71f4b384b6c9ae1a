"""The learning-rate sweep in small: 4 learning rates × 3 kinds of attention × 2 seeds = 24 trials.

Command:  python -m experiments.sweep --config=configs/sweeps/demo.py --config.workers=2
          python -m experiments.sweep --report --sweep=runs/sweeps/demo
Hardware: 2 CPU cores.
Time:     7 minutes, beside other programs and killed twice (2 cores of an AMD EPYC, 2026-11-24).
Expect:   best mean validation loss 2.119 at learning rate 0.01 with QK-norm, 2.133 with RBF, see
          docs/measurements/sweep_cpu.md.
"""

from configs.sweeps import base


def get_config():
    """Returns the sweep."""
    config = base.get_config()
    config.base = "configs/demo.py:rbf"
    config.space = (
        {"optimizer.learning_rate": (1e-3, 3e-3, 1e-2, 3e-2)},
        {
            "model.attention.kind": ("rbf", "dot", "dot"),
            "model.attention.qk_norm": (False, False, True),
        },
        # One for all, so that attention alone differs.
        {"model.positions": ("rope",)},
        # Small enough for many.
        {"data.tokenizer": ("bytes",), "data.vocab_size": (4096,)},
        {"data.context_length": (64,)},
        {"model.d_model": (64,)},
        {"train.steps": (120,)},
        {"train.batch_size": (16,)},
        {"train.eval_every": (20,)},
        {"train.checkpoint_every": (20,)},
        {"train.eval_batches": (16,)},
        {"logging.tensorboard": (False,)},
    )
    config.seeds = 2
    return config
