"""Seconds, for tests and for trying the programs out.

Command:  python -m experiments.train --config=configs/smoke.py
Hardware: any CPU.
Time:     20 seconds on 2 cores of an AMD EPYC, most of them to read and compile.
Expect:   validation loss about 5.08 (7.32 bits per byte).
"""

from configs import base


def get_config():
    """Returns the configuration."""
    config = base.get_config()
    config.data.context_length = 32
    config.model.num_layers = 1
    config.model.d_model = 16
    config.model.num_heads = 2
    config.optimizer.warmup_steps = 5
    config.train.steps = 40
    config.train.batch_size = 4
    config.train.log_every = 5
    config.train.eval_every = 20
    config.train.checkpoint_every = 10
    config.train.eval_batches = 2
    return config
