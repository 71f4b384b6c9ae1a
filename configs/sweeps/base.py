"""The whole schema of a sweep file: every key, with its default.

A sweep file imports this one, names the configuration that all trials start from, and the space:

    from configs.sweeps import base

    def get_config():
        config = base.get_config()
        config.base = "configs/demo.py:rbf"
        config.space = (
            {"optimizer.learning_rate": (1e-3, 3e-3, 1e-2)},
            {
                "model.attention.kind": ("rbf", "dot", "dot"),
                "model.attention.qk_norm": (False, False, True),
            },
        )
        return config

An axis is a dictionary from keys of configs/base.py to values; several keys of one axis go
together (a zip). A tuple of axes is their product: 3 × 3 points above. A dictionary of such tuples,
each with a name, is the union of their points: one that several share is trained once. An axis of
one value sets it everywhere. With sampler "random" or "tpe" an axis may be a range instead:
``{"optimizer.learning_rate": base.log_range(1e-4, 1e-2)}``.

On the command line: ``--config.workers=2`` for the keys below, ``--base.train.steps=100`` for keys
of the configuration that all trials start from.
"""

from ml_collections import ConfigDict, FieldReference


def linear_range(low: float, high: float) -> dict[str, float | bool]:
    """Returns the range of numbers from `low` to `high`; whole numbers if both are ints."""
    return {"low": low, "high": high, "log": False}


def log_range(low: float, high: float) -> dict[str, float | bool]:
    """Returns the same as `linear_range`, sampled evenly in the logarithm."""
    return {"low": low, "high": high, "log": True}


def slurm() -> ConfigDict:
    """What each worker asks Slurm for; "" and 0 leave it to the cluster."""
    return ConfigDict(
        {
            "partition": "",
            "account": "",
            "qos": "",
            "constraint": "",
            # Of a worker; what is unfinished then is requeued and goes on from its checkpoint.
            "timeout_min": 24 * 60,
            "gpus_per_node": 1,
            "cpus_per_task": 8,
            "mem_gb": 0,
            # Shell commands before the worker starts, such as "module load cuda".
            "setup": (),
        }
    )


def get_config() -> ConfigDict:
    """Returns the default sweep, which has no base and no space yet."""
    return ConfigDict(
        {
            # Configuration file that all trials start from, with :VARIANT where it has some.
            "base": "",
            # A tuple of axes, or a dictionary of such tuples, as said above.
            "space": FieldReference(None, field_type=object),
            # Each point is trained with the seeds 0 … seeds - 1, a trial each.
            "seeds": 1,
            # "grid": every point. "random", "tpe": `trials` points drawn from one product of axes,
            # the second where those done so far were good.
            "sampler": "grid",
            "sampler_seed": 0,
            # Points to draw; 0 for "grid".
            "trials": 0,
            # What a trial is worth: its "best" validation loss or its "final" one.
            "objective": "best",
            # Ends trials early by their validation losses so far: "none"; "median", those worse
            # than the median of the others at the same step; "halving", successive halving.
            "pruner": "none",
            # For "median": trials that must have ended, and evaluations that every trial has,
            # before one is pruned.
            "prune_after_trials": 5,
            "prune_after_evaluations": 1,
            # "local": processes of this machine. "slurm": jobs.
            "executor": "local",
            # Workers; each trains one trial at a time. 0: one per GPU, or one on a machine without.
            # On a machine with GPUs, each worker has one of its own.
            "workers": 0,
            # A trial whose worker dies so many times without a new checkpoint has failed.
            "max_deaths": 3,
            # For "slurm".
            "slurm": slurm(),
        }
    )
