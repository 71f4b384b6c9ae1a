"""A small RBF model and its dot-product twin on the embedded stories.

Command:  make demo, or
          python -m experiments.train --config=configs/demo.py:rbf --run=runs/demo/rbf
          python -m experiments.train --config=configs/demo.py:dot --run=runs/demo/dot
Hardware: 2 CPU cores.
Time:     75 seconds each; 19,000 to 20,200 tokens/s (2 cores of an AMD EPYC, 2026-11-23).
Expect:   validation loss 0.771 (0.337 bits per byte) with "rbf", 0.781 (0.341) with "dot".
"""

from configs import base
from configs.twins import twin


def get_config(variant: str = "rbf"):
    """Returns the configuration of the variant "rbf" or "dot"."""
    config = base.get_config()
    config.data.tokenizer = "bpe"
    config.data.vocab_size = 1024
    config.data.context_length = 128
    config.model.num_layers = 2
    config.model.d_model = 128
    config.optimizer.learning_rate = 3e-3
    config.optimizer.final_learning_rate = 3e-5
    config.optimizer.warmup_steps = 50
    config.train.steps = 350
    config.train.batch_size = 32
    config.train.log_every = 10
    config.train.eval_every = 50
    config.train.checkpoint_every = 50
    return twin(config, variant)
