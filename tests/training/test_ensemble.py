"""Several seeds at once are what each is alone."""

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbf_jax.training import TrainingStopped, load_run, train
from rbf_jax.training.ensemble import train_ensemble
from rbf_jax.training.ensemble_programs import Texts, compile_programs
from rbf_jax.training.run_folder import RunFolder
from tests.harness.tiny import tiny_config

SEEDS = (0, 3)


def diagnose(model, params, batch):
    return {"norm": jnp.linalg.norm(params["final_norm"]["scale"]), "rows": batch["inputs"].sum()}


@pytest.fixture(scope="module")
def config(corpus):
    config = tiny_config(corpus)
    config.train.log_every = 2
    return config


@pytest.fixture(scope="module")
def ensemble(config, tmp_path_factory):
    """The folder, its texts and its programs."""
    folder = tmp_path_factory.mktemp("ensemble")
    texts = Texts.read(config, SEEDS, folder / "tokenizer")
    programs = compile_programs(config, texts, lengths=(16, 64), diagnose=diagnose)
    seen = []
    run = folder / "run"
    train_ensemble(
        config, run, texts, programs, on_chunk=lambda step, losses: seen.append((step, losses))
    )
    assert [step for step, _ in seen] == [2, 4, 6, 8, 10, 12]
    return run, texts, programs


def lines(run, split):
    """By step; wall time left out."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {x["step"]: {**x, "seconds": 0} for x in found if x["split"] == split}


def test_members_are_ordinary_runs(config, ensemble, finished_run, tmp_path):
    run, *_ = ensemble
    own = config.copy_and_resolve_references()
    own.seed = SEEDS[1]
    train(own, tmp_path)
    # That of the first seed has been trained already; it logs more steps.
    for index, alone in enumerate((finished_run, tmp_path)):
        for split in ("train", "valid"):
            found, together = lines(alone, split), lines(run, split)
            for step in lines(tmp_path, split):
                loss = together[step]["loss"][index]
                assert loss == pytest.approx(found[step]["loss"], rel=2e-5)
        inspected, found = lines(run, "inspect"), lines(alone, "train")
        for step in inspected.keys() & found.keys():
            logit_max = inspected[step]["logit_max"][index]
            assert logit_max == pytest.approx(found[step]["logit_max"], rel=1e-3)
        a, b = load_run(alone), load_run(run / "seeds" / str(SEEDS[index]))
        assert a.step == b.step
        for x, y in zip(_leaves(a), _leaves(b)):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)
    assert load_run(tmp_path).config == b.config


def _leaves(run):
    return jax.tree.leaves(run.variables)


def test_what_is_asked_in_the_end(ensemble):
    run, texts, _ = ensemble
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lengths = {x["length"]: x["loss"] for x in found if x["split"] == "length"}
    assert list(lengths) == [16, 64]
    assert all(1 < loss < 7 for losses in lengths.values() for loss in losses)
    (inside,) = (x for x in found if x["split"] == "inside")
    assert len(inside["norm"]) == len(SEEDS)
    assert inside["rows"][0] == texts.valid["inputs"][0, :16].sum()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["seeds"] == [*SEEDS]


def test_finished_it_is_not_trained_again(config, ensemble):
    run, texts, programs = ensemble
    before = (run / "metrics.jsonl").stat().st_mtime_ns
    assert train_ensemble(config, run, texts, programs)["seeds"] == [*SEEDS]
    assert (run / "metrics.jsonl").stat().st_mtime_ns == before


def test_stopped_it_goes_on(config, ensemble, tmp_path):
    run, texts, programs = ensemble

    def stop(step, losses):
        if step == 4:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(TrainingStopped, match="after step"):
        train_ensemble(config, tmp_path / "run", texts, programs, on_chunk=stop)
    assert RunFolder(tmp_path / "run").read_summary() is None
    train_ensemble(config, tmp_path / "run", texts, programs, keep_members=False)
    for split in ("train", "inspect", "valid", "length", "inside"):
        assert lines(tmp_path / "run", split) == lines(run, split)


def test_a_diverged_member_leaves_the_others_alone(config, ensemble, tmp_path):
    run, texts, programs = ensemble
    create = programs.create

    def broken(seeds):
        state = create(seeds)
        params = state.params
        params["final_norm"]["scale"] = params["final_norm"]["scale"].at[1].set(jnp.nan)
        return state.replace(params=params)

    object.__setattr__(programs, "create", broken)
    try:
        train_ensemble(config, tmp_path / "run", texts, programs)
    finally:
        object.__setattr__(programs, "create", create)
    for step, line in lines(run, "train").items():
        assert lines(tmp_path / "run", "train")[step]["loss"] == [line["loss"][0], None]
    member = json.loads((tmp_path / "run" / "seeds" / "3" / "summary.json").read_text())
    assert member["best_valid_loss"] is None


def test_all_batches_are_made_once(config, tmp_path):
    texts = Texts.read(config, SEEDS, tmp_path)
    texts.make_all()
    made = list(texts.chunks)
    assert len(made) * config.train.log_every == config.train.steps
    for chunk, again in zip(made, texts.steps_from(0)):
        assert again is chunk


def test_steps_must_come_in_chunks(config, ensemble):
    _, texts, _ = ensemble
    odd = config.copy_and_resolve_references()
    odd.train.eval_every = 3
    odd.train.checkpoint_every = 1
    with pytest.raises(ValueError, match=r"train.eval_every is 3; in an ensemble it must be"):
        compile_programs(odd, texts)


def test_too_little_text_for_a_length(config, ensemble):
    _, texts, _ = ensemble
    with pytest.raises(ValueError, match="too few for a row of 100000"):
        compile_programs(config, texts, lengths=(100_000,))
