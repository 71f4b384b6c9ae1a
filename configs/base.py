"""The whole schema: every key that a config may set, with its default.

A config file imports this one and changes what differs:

    from configs import base

    def get_config():
        config = base.get_config()
        config.model.num_layers = 2
        return config

On the command line: ``--config=configs/NAME.py --config.model.num_layers=2``.
A key that is not here is an error that names the nearest one that is.
"""

from ml_collections import ConfigDict, FieldReference


def optional(kind: type, value: int | float | str | None = None) -> FieldReference:
    """Returns a key that holds a `kind` or None; on the command line: ``--config.x.y=None``."""
    return FieldReference(value, field_type=kind)


def data() -> ConfigDict:
    """Where the text comes from and how it becomes batches."""
    return ConfigDict(
        {
            # "embedded": simple stories generated on the spot, deterministic, some 5 MB.
            # "text": the files below. "tinystories": downloaded through tensorflow-datasets, the
            # stories by GPT-4 only; "tinystories/original": the first version.
            # "tfds:NAME": any tensorflow-datasets text data set, for example "tfds:lm1b".
            "source": "embedded",
            # For "text": .txt, .gz or .xz files, UTF-8; glob patterns are expanded.
            "train_files": (),
            # For "text": validation files. Empty: the last 5 % of the training documents.
            "valid_files": (),
            # For "text": the string between documents; "" for one document a file. White space
            # around a document is dropped, and a byte order mark.
            "separator": "<|endoftext|>",
            # For "tinystories" and "tfds:NAME": tfds data directory, and manually fetched files;
            # "" for the defaults of tensorflow-datasets.
            "tfds_dir": "",
            "manual_dir": "",
            # "bytes", "bpe" (trained on the training text, kept in the run folder), or the path
            # of a tokenizer.json.
            "tokenizer": "bytes",
            # For "bpe": number of tokens, special tokens included.
            "vocab_size": 4096,
            # Tokens per row of a batch, T.
            "context_length": 256,
            # "packed": as many documents in a row as fit, attention kept inside each by segment
            # ids; documents longer than T are cut into pieces of T, and nothing is lost.
            # "padded": one document a row, cut or padded to T.
            "layout": "packed",
            # Token arrays are cached here, keyed by content.
            "cache_dir": ".cache/tokens",
            # Processes that prepare batches; 0 prepares them in the training process.
            "num_workers": 0,
        }
    )


def attention() -> ConfigDict:
    """One attention layer; the same in every block."""
    return ConfigDict(
        {
            # "rbf": softmax(2γ q·k − λγ‖k‖²); "dot": softmax(scale · q·k).
            "kind": "rbf",
            # For "dot": "standard" is 1/√H; "rbf" is 2/√H, RBF's scale at its default γ.
            "dot_scale": "standard",
            # RMS-normalise queries and keys per head, with a learned scale.
            "qk_norm": False,
            # γ at the start; None is 1/√H. Learned per head, positive by construction, if asked.
            "gamma": optional(float),
            "learn_gamma": False,
            # λ at the start, the weight of the key norms (1 RBF, 0 dot product). For "rbf" only.
            "key_norm_weight": 1.0,
            "learn_key_norm_weight": False,
            # What a query attends to where no token is near. "none". "origin": a virtual key at
            # the origin with value 0. "learned": a virtual key with value 0 whose logit is learned
            # per head, from 0. "register": register tokens in front of the sequence.
            "sink": "register",
            # False: sums of exp(−γ‖q − k‖²) v, without softmax's denominator. For "rbf" only.
            "normalize": True,
            # Exclusive self attention: remove from each output its component along the token's
            # own value.
            "exclusive": False,
            # Attend to the last `window` tokens (and itself) only; None for all. Less than
            # data.context_length - 1.
            "window": optional(int),
            # Implementation of the operation; None takes the best available.
            "implementation": optional(str),
        }
    )


def model() -> ConfigDict:
    """The causal language model."""
    return ConfigDict(
        {
            "num_layers": 4,
            "d_model": 256,
            "num_heads": 4,
            # Key/value heads; None for as many as query heads.
            "num_kv_heads": optional(int),
            # Width of the MLP over d_model.
            "mlp_ratio": 4,
            # Norms of the residual stream: "rms", or "layer", which has biases; and biases in the
            # projections of attention and MLP. GPT-2 has "layer" and True.
            "norm": "rms",
            "use_bias": False,
            # "susie", "rope", "alibi", "learned" or "none".
            "positions": "susie",
            # Learned vectors in front of the sequence, and how they start: "zero" or "normal".
            # None: 1 with attention.sink "register", else 0. The sinks "origin" and "learned" may
            # have registers too.
            "num_registers": optional(int),
            "register_init": "zero",
            "tie_embeddings": True,
            # Activations: "float32" or "bfloat16". Parameters are float32 always.
            "dtype": "float32",
            # Recompute blocks in the backward pass, keeping attention's output and logsumexp.
            "remat": False,
            # Entries of the vocabulary whose logits exist at once in the loss, for all tokens of a
            # (micro-)batch, and the dtype that they are stored in: "float32" or "bfloat16", which
            # is faster by as much as it is less exact. The softmax is float32 always.
            "loss_chunk": 8192,
            "loss_dtype": "float32",
            "attention": attention(),
        }
    )


def optimizer() -> ConfigDict:
    """AdamW, linear warm-up, cosine decay."""
    return ConfigDict(
        {
            "learning_rate": 1e-3,
            "final_learning_rate": 1e-5,
            "warmup_steps": 100,
            "weight_decay": 0.1,
            "b1": 0.9,
            "b2": 0.95,
            # Clip the gradient's global norm; None for no clipping.
            "clip_norm": optional(float, 1.0),
            # Steps in which λ goes in a straight line from model.attention.key_norm_weight to 1,
            # where it stays, in place of being fixed or learned; 0: none. For "rbf" only.
            "anneal_steps": 0,
            # Micro-batches per step: memory for time, the same update. Times mesh.data × mesh.fsdp
            # it divides the batch size.
            "accumulate_steps": 1,
        }
    )


def train() -> ConfigDict:
    """The loop."""
    return ConfigDict(
        {
            "steps": 1000,
            # Parameters at the start: of the newest checkpoint of a run folder, or of GPT-2 in a
            # folder as Hugging Face has it; "" draws them. They must fit the model:
            # experiments.convert sees to it.
            "init_from": "",
            # Rows per step, over all devices and micro-batches.
            "batch_size": 32,
            # Steps between lines of metrics, evaluations and checkpoints; the last step has all
            # three. Every evaluation has its checkpoint: eval_every is a multiple of
            # checkpoint_every.
            "log_every": 10,
            "eval_every": 100,
            "checkpoint_every": 100,
            # Batches per evaluation; 0 for the whole validation split.
            "eval_batches": 0,
            # Checkpoints to keep: the newest ones, and the one of best validation loss beside them.
            "keep_checkpoints": 2,
        }
    )


def mesh() -> ConfigDict:
    """The devices of a run, as a grid; the product is their number.

    Where a run is computed is no part of what it computes: a run may go on with another mesh, on
    another number of devices or processes (and with another optimizer.accumulate_steps or
    model.remat).
    """
    return ConfigDict(
        {
            # Rows of a batch; parameters whole on each device. -1 in one of the four axes takes
            # the devices that the others leave.
            "data": -1,
            # Rows of a batch too; parameters and optimizer state split, and gathered where used.
            "fsdp": 1,
            # Attention heads and the MLP's width: a part of each matrix product on each device.
            # Divides the numbers of heads.
            "tensor": 1,
            # Tokens of a row: for contexts too long for one device. Divides data.context_length.
            "seq": 1,
        }
    )


def logging() -> ConfigDict:
    """Where metrics go beside metrics.jsonl."""
    return ConfigDict(
        {
            "tensorboard": True,
            # Weights & Biases project; "" for none. WANDB_MODE=offline works.
            "wandb_project": "",
        }
    )


def get_config() -> ConfigDict:
    """Returns the default configuration."""
    return ConfigDict(
        {
            # Seeds parameters and the order of the data.
            "seed": 0,
            "data": data(),
            "model": model(),
            "optimizer": optimizer(),
            "train": train(),
            "mesh": mesh(),
            "logging": logging(),
        }
    )
