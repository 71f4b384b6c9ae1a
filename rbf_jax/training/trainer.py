"""A run: made or taken up again, trained to its end."""

from __future__ import annotations

import collections
import contextlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rbf_jax.data import load_data
from rbf_jax.nn import CausalLM
from rbf_jax.training.checkpoint import Checkpoints, saved_steps
from rbf_jax.training.config import SMALLEST_VOCABULARY, model_config
from rbf_jax.training.distributed import (
    StopVote,
    first_before_others,
    is_first,
    texts_of_all,
    together,
)
from rbf_jax.training.evaluation import evaluate
from rbf_jax.training.initial import open_source, start_from
from rbf_jax.training.metrics import (
    MetricsFile,
    Values,
    Writer,
    all_finite,
    open_writers,
    read_valid_losses,
    to_numbers,
)
from rbf_jax.training.optimizer import make_optimizer
from rbf_jax.training.progress import Progress, Stopwatch
from rbf_jax.training.run_folder import RunFolder
from rbf_jax.training.sharding import data_share, on_mesh, place_batch, replicated
from rbf_jax.training.signals import StopRequest
from rbf_jax.training.state import create_state, fingerprint, state_shapes, with_params
from rbf_jax.training.step import compile_train_step, make_eval_step, make_inspect_step

if TYPE_CHECKING:
    import grain

logger = logging.getLogger(__name__)

# Steps that may be waiting on the device: enough to keep it busy, few enough to stop soon.
_STEPS_IN_FLIGHT = 8


class TrainingStopped(Exception):
    """A signal ended the run early; its state was saved.

    Attributes:
      signal: its number.
    """

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


class TrainingDiverged(Exception):
    """Loss, gradients or parameters are not finite."""


class Trainer:
    """The parts of a run and its state.

    Attributes:
      config: of the run.
      data: both splits.
      model: the language model.
      state: after `step` steps.
      step: steps done.
      seconds: spent in training steps, over all parts of an interrupted run.
    """

    def __init__(
        self,
        config: ConfigDict,
        folder: RunFolder,
        mesh: Mesh,
        on_evaluation: Callable[[int, float], None] | None = None,
    ):
        """Makes the parts, and goes back to the newest good checkpoint if there is one.

        Args:
          config: valid, see `rbf_jax.training.config.validate`.
          folder: of the run, claimed.
          mesh: of all devices.
          on_evaluation: called with step and validation loss when the checkpoint of an evaluation
            has been started; what it raises ends the run.

        Raises:
          ValueError: the data cannot be read, the model cannot be made, or no checkpoint is good.
          NotImplementedError: attention cannot be computed as the configuration wants it.
        """
        self.config = config
        self._folder, self._mesh, self._on_evaluation = folder, mesh, on_evaluation
        self._optimizer = make_optimizer(config.optimizer, config.train.steps)
        if config.model.attention.implementation is not None:
            # What it cannot do is told before text is tokenised, which may take minutes.
            state_shapes(CausalLM(model_config(config, SMALLEST_VOCABULARY)), self._optimizer)
        # Process 0 first: it makes the tokenizer, and the cache where it is shared.
        self.data = first_before_others(
            lambda: load_data(config.data, seed=config.seed, tokenizer_dir=folder.path)
        )
        if len(set(texts_of_all(self.data.fingerprint))) > 1:
            raise ValueError("the processes have not all found the same data and tokenizer.")
        self.model = CausalLM(model_config(config, self.data.tokenizer.vocab_size))
        self.state = create_state(self.model, self._optimizer, config.seed, mesh)
        # A run that goes on has no need of them any more.
        if config.train.init_from and not saved_steps(folder.checkpoints):
            source = open_source(config.train.init_from)
            params = start_from(source, self.state.params, self.data.tokenizer)
            self.state = with_params(self.state, params)
        # What cannot be compiled leaves no file in the folder.
        self._compile()
        with contextlib.ExitStack() as opened:
            self._open(opened)
            self._opened = opened.pop_all()
        if self.step:
            logger.info("Going on from the checkpoint of step %d.", self.step)

    @property
    def seconds(self) -> float:
        """Spent in training steps."""
        return self._watch.seconds

    @property
    def num_parameters(self) -> int:
        """Of the model."""
        return sum(x.size for x in jax.tree.leaves(self.state.params))

    @property
    def valid_losses(self) -> dict[int, float]:
        """Validation loss by step."""
        return self._checkpoints.losses

    def run(self, stop: StopRequest) -> None:
        """Trains to the last step.

        Raises:
          TrainingStopped: a signal came; the state was saved.
          TrainingDiverged: something is not finite; nothing of it was saved.
        """
        steps = self.config.train.steps
        in_flight: collections.deque[jax.Array] = collections.deque()
        vote = StopVote(self._mesh)
        with Progress(self.step, steps, shown=is_first()) as progress:
            self._watch.start()
            while self.step < steps:
                if signal := vote(stop.received):
                    self._stop(signal)
                batch = place_batch(next(self._batches), self._mesh)
                self.state, metrics = self._train_step(self.state, batch)
                self.step += 1
                in_flight.append(metrics["loss"])
                if len(in_flight) > _STEPS_IN_FLIGHT:
                    in_flight.popleft().block_until_ready()
                self._after_step(batch, metrics, progress)

    def close(self) -> None:
        """Waits for the last checkpoint, closes all files and ends the workers of the data."""
        self._opened.close()

    def _open(self, opened: contextlib.ExitStack) -> None:
        """Opens data, checkpoints and metrics where the run goes on; `opened` closes them."""
        config, folder = self.config, self._folder
        self._checkpoints = Checkpoints(
            folder.checkpoints,
            keep=config.train.keep_checkpoints,
            data_fingerprint=self.data.fingerprint,
        )
        opened.callback(self._checkpoints.close)
        seconds = 0.0
        if restored := self._checkpoints.restore_newest(self.state):
            self.state, seconds = restored
        self.step = int(self.state.step)
        self._watch = Stopwatch(seconds)
        self._logged = (self.step, seconds)
        with together():
            self._batches = iter(self._share_of("train", config.train.batch_size, self.step))
            opened.callback(self._batches.close)
            losses = read_valid_losses(folder.metrics)
            self._checkpoints.losses.update((s, losses[s]) for s in losses if s <= self.step)
            self._writers: list[Writer] = []
            if is_first():
                self._writers.append(MetricsFile(folder.metrics, self.step))
                self._writers += open_writers(config, folder, self.step)
            for writer in self._writers:
                opened.callback(writer.close)

    def _share_of(self, split: str, rows: int, start: int = 0) -> grain.IterDataset:
        """Returns this process's share of batches of `rows` rows: of "train" in random order for
        ever, of "valid" once."""
        index, count = data_share(self._mesh)
        return self.data.batches(
            split,
            rows // count,
            shuffle=split == "train",
            repeat=split == "train",
            process_index=index,
            process_count=count,
            start=start,
        )

    def _compile(self) -> None:
        packed = self.config.data.layout == "packed"
        # Ahead of time, so that compiling does not count as training.
        self._train_step = compile_train_step(
            self.config, self.model, self._optimizer, self.state, self._mesh
        )
        whole = replicated(self._mesh)
        eval_step = jax.jit(make_eval_step(self.model, packed=packed), out_shardings=whole)
        inspect_step = jax.jit(make_inspect_step(self.model), out_shardings=whole)
        self._eval_step = on_mesh(self._mesh, eval_step)
        self._inspect_step = on_mesh(self._mesh, inspect_step)

    def _after_step(self, batch: Any, metrics: dict[str, jax.Array], progress: Progress) -> None:
        """Logs, evaluates and saves where it is time to."""
        config, last = self.config.train, self.step == self.config.train.steps
        log = last or self.step == 1 or self.step % config.log_every == 0
        save = last or self.step % config.checkpoint_every == 0
        if not (log or save):
            return
        jax.block_until_ready(metrics)
        self._watch.stop()
        self._require_finite()
        if log:
            self._log(batch, metrics, progress)
        evaluation = last or self.step % config.eval_every == 0
        if evaluation:
            self._evaluate(progress)
        if save:
            self._save()
        if evaluation and self._on_evaluation is not None:
            self._on_evaluation(self.step, self.valid_losses[self.step])
        self._watch.start()

    def _log(self, batch: Any, metrics: dict[str, jax.Array], progress: Progress) -> None:
        inspected = self._inspect_step(self.state.params, batch)
        steps, seconds = self.step - self._logged[0], self.seconds - self._logged[1]
        tokens = self.config.train.batch_size * self.config.data.context_length
        self._logged = (self.step, self.seconds)
        rate = steps * tokens / seconds
        values = {
            **to_numbers({name: metrics[name] for name in ("loss", "grad_norm", "learning_rate")}),
            **to_numbers(inspected),
            "tokens_per_second": rate,
            "seconds": self.seconds,
        }
        if not all_finite(values):
            self._diverged(self.step)
        left = (self.config.train.steps - self.step) * tokens / rate
        self._write("train", values)
        progress.log(self.step, values["loss"], rate, left)

    def _evaluate(self, progress: Progress) -> None:
        # Not more rows at once than a training step has.
        rows = self.config.train.batch_size // self.config.optimizer.accumulate_steps
        values = evaluate(
            self._eval_step,
            self.state.params,
            self._share_of("valid", rows),
            self._mesh,
            bytes_per_token=self.data.bytes_per_token["valid"],
            limit=self.config.train.eval_batches,
        )
        if not all_finite(values):
            self._diverged(self.step)
        self._write("valid", values)
        self._checkpoints.losses[self.step] = values["loss"]
        progress.evaluated(self.step, values)

    def _save(self) -> None:
        if not fingerprint(self.state).finite:
            self._diverged(self.step)
        for writer in self._writers:
            writer.flush()
        self._checkpoints.save(self.state, self.seconds)

    def _stop(self, signal: int) -> None:
        self._require_finite()  # Which waits for the steps in flight.
        self._watch.stop()
        self._save()
        self._checkpoints.wait()
        raise TrainingStopped(
            f"stopped by a signal after step {self.step}, which is saved; "
            "the same command goes on from there.",
            signal,
        )

    def _require_finite(self) -> None:
        if bad_step := int(self.state.bad_step):
            self._diverged(bad_step)

    def _diverged(self, bad_step: int) -> None:
        self._checkpoints.wait()
        saved = self._checkpoints.steps
        last_good = (
            f"the last good checkpoint is that of step {saved[-1]} in {self._folder.checkpoints}"
            if saved
            else "there is no checkpoint yet"
        )
        raise TrainingDiverged(
            f"loss, gradient or parameters are not finite at step {bad_step}, found after step "
            f"{self.step}; {last_good}. "
            "A lower optimizer.learning_rate or optimizer.clip_norm may help."
        )

    def _write(self, split: str, values: Values) -> None:
        for writer in self._writers:
            writer.write(self.step, split, values)
