"""The configuration that all variants of a figure start from, and the seeds, at three scales.

smoke   a minute or two a figure, on a CPU, most of it compiling: for tests
small   minutes a figure, on 2 CPU cores: to see the pipeline work, not to learn from
paper   for a GPU; on TinyStories, from tensorflow-datasets unless --base.data.source=text and files
        say otherwise

Everywhere: RBF attention, SuSiE positions, one register that starts at the origin, unless the space
of a figure says otherwise; the same learning rate for all.
"""

from configs import base

SEEDS = {"smoke": 2, "small": 4, "paper": 4}


def get_config(scale: str = "small"):
    """Returns the configuration of the scale "smoke", "small" or "paper".

    Raises:
      ValueError: there is no such scale.
    """
    if scale not in SEEDS:
        raise ValueError(f"the scale is {scale!r}; it must be one of {', '.join(SEEDS)}.")
    config = base.get_config()
    config.logging.tensorboard = False
    config.train.keep_checkpoints = 1
    return {"smoke": _smoke, "small": _small, "paper": _paper}[scale](config)


def _smoke(config):
    config.data.context_length = 32
    config.model.num_layers = 1
    config.model.d_model = 16
    config.model.num_heads = 2
    config.optimizer.warmup_steps = 2
    config.train.steps = 8
    config.train.batch_size = 4
    config.train.log_every = 2
    config.train.eval_every = 4
    config.train.checkpoint_every = 4
    config.train.eval_batches = 3
    return config


def _small(config):
    config.data.context_length = 64
    config.model.num_layers = 2
    config.model.d_model = 64
    config.model.num_heads = 2
    config.optimizer.learning_rate = 3e-3
    config.optimizer.final_learning_rate = 3e-5
    config.optimizer.warmup_steps = 20
    config.train.steps = 200
    config.train.batch_size = 16
    config.train.log_every = 10
    config.train.eval_every = 20
    config.train.checkpoint_every = 100
    config.train.eval_batches = 10
    return config


def _paper(config):
    config.data.source = "tinystories"
    config.data.tokenizer = "bpe"
    config.data.vocab_size = 1024
    config.data.context_length = 256
    config.model.num_layers = 4
    config.model.d_model = 256
    config.model.num_heads = 4
    config.model.dtype = "bfloat16"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.final_learning_rate = 3e-5
    config.optimizer.warmup_steps = 100
    config.train.steps = 2000
    config.train.batch_size = 32
    config.train.log_every = 10
    config.train.eval_every = 100
    config.train.checkpoint_every = 1000
    config.train.eval_batches = 24
    return config
