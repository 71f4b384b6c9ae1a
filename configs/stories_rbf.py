"""RBF attention at the sizes of the original experiment, on TinyStories.

Command:  python -m experiments.train --config=configs/stories_rbf.py
          On your own text:
          python -m experiments.train --config=configs/stories_rbf.py --run=runs/mine_rbf \
            --config.data.source=text --config.data.train_files=FILE --config.data.valid_files=FILE
Hardware: a GPU. 2 CPU cores do 3,000 tokens/s, 50 hours for the 33,000 steps; for them, make it
          smaller: --config.model.num_layers=2 --config.model.d_model=128 --config.train.steps=500
          --config.optimizer.warmup_steps=50 --config.train.eval_every=100
          --config.train.checkpoint_every=100
Time:     not measured at full length.
Expect:   not measured at full length.

Unlike the original, the vocabulary is not GPT-2's 50,257 but a BPE of 8,192 tokens made from the
training text; with a file of the other, give --config.data.tokenizer=PATH/tokenizer.json
--config.data.vocab_size=4096, the default, which a file makes no use of. And embeddings are tied:
the original's 29 M parameters had a head of its own, for which give
--config.model.tie_embeddings=false.
"""

from configs import base
from configs.twins import twin


def get_config():
    """Returns the configuration."""
    config = base.get_config()
    config.data.source = "tinystories"
    config.data.tokenizer = "bpe"
    config.data.vocab_size = 8192
    config.data.context_length = 256
    config.data.layout = "padded"
    config.model.num_layers = 4
    config.model.d_model = 256
    config.model.num_heads = 4
    config.optimizer.learning_rate = 1e-3
    config.optimizer.final_learning_rate = 1e-5
    config.optimizer.warmup_steps = 1000
    config.train.steps = 33_000
    config.train.batch_size = 64
    config.train.log_every = 50
    config.train.eval_every = 1000
    config.train.checkpoint_every = 500
    return twin(config, "rbf")
