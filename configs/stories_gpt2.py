"""A small dot-product model of GPT-2's kind: something to convert, with configs/convert.py.

Command:  python -m experiments.train --config=configs/stories_gpt2.py --run=runs/gpt2 \
            --config.data.source=text --config.data.train_files=FILE --config.data.valid_files=FILE
Hardware: any CPU.
Time:     23 minutes on a machine of 2 cores that others kept busy; it means little.
Expect:   validation loss 3.14 nats per token on the TinyStories sample, seeds 0 and 1.
"""

from configs import base


def get_config():
    """Returns the configuration."""
    config = base.get_config()
    config.data.tokenizer = "bpe"
    config.data.vocab_size = 1024
    config.data.context_length = 128
    config.model.num_layers = 2
    config.model.d_model = 128
    config.model.num_heads = 4
    config.model.norm = "layer"
    config.model.use_bias = True
    config.model.positions = "learned"
    config.model.attention.kind = "dot"
    config.model.attention.sink = "none"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 50
    config.train.steps = 800
    config.train.batch_size = 16
    config.train.log_every = 20
    config.train.eval_every = 100
    config.train.checkpoint_every = 100
    config.train.eval_batches = 40
    return config
