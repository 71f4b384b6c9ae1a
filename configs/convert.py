"""A dot-product model made RBF by the dial, on text.

Command:  python -m experiments.convert --from=FOLDER --config=configs/convert.py \
            --config.data.source=text --config.data.train_files=FILE --config.data.valid_files=FILE
          FOLDER is GPT-2 as Hugging Face has it, or a run of ours, say of configs/stories_gpt2.py.
Hardware: for that run any CPU; for GPT-2 a GPU.
Time:     8 minutes an arm on a machine of 2 cores that others kept busy; it means little.
Expect:   with that run, on the TinyStories sample: 3.116 at λ = 0, 3.243 at λ = 1 untrained;
          annealed 3.086, control 3.068. docs/convert.md has more.

The model and its tokenizer are those of FOLDER. What may be said of the model here is how it is
computed: dtype, remat, loss_chunk, loss_dtype and attention.implementation.
"""

from configs import base


def get_config():
    """Returns the configuration."""
    config = base.get_config()
    config.data.context_length = 128
    # λ at the start, and the steps from there to 1.
    config.model.attention.key_norm_weight = 0.0
    config.optimizer.anneal_steps = 100
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 20
    config.train.steps = 200
    config.train.batch_size = 16
    config.train.log_every = 10
    config.train.eval_every = 20
    config.train.checkpoint_every = 20
    config.train.eval_batches = 20
    return config
