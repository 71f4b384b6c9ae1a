import json

import numpy as np
import pytest

from rbf_jax.analysis.conversion import conversion_figure, merge


def write_report(folder, seed, shift, steps=5):
    arms = {
        "annealed": {
            "valid_loss": [[2, 3.4 + shift], [4, 3.1]],
            "final": 3.1,
            "recovered_at": None,
        },
        "switched": {"valid_loss": [[2, 3.9], [4, 3.2]], "final": 3.2, "recovered_at": None},
        "control": {"valid_loss": [[2, 2.9], [4, 2.8]], "final": 2.8 + shift, "recovered_at": 2},
    }
    report = {
        "command": "python",
        "config": {"seed": seed, "optimizer": {"anneal_steps": 3}, "train": {"steps": steps}},
        "untrained": {"dot_product": 3.0 + shift, "rbf": 5.0},
        "lost": 2.0 - shift,
        "arms": arms,
    }
    folder.mkdir()
    (folder / "convert.json").write_text(json.dumps(report))
    return folder


@pytest.fixture
def folders(tmp_path):
    return [write_report(tmp_path / "a", 0, 0.0), write_report(tmp_path / "b", 1, 0.2)]


def test_means_over_seeds(folders):
    merged = merge(folders)
    assert merged["seeds"] == [0, 1]
    assert merged["mean"] == {
        "dot_product": 3.1,
        "rbf_untrained": 5.0,
        "lost": 1.9,
        "annealed": {
            "final": 3.1,
            "final_minus_dot_product": 0.0,
            "final_minus_control": 0.2,
            "recovered_at": [None, None],
        },
        "switched": {
            "final": 3.2,
            "final_minus_dot_product": 0.1,
            "final_minus_control": 0.3,
            "recovered_at": [None, None],
        },
        "control": {"final": 2.9, "final_minus_dot_product": -0.2, "recovered_at": [2, 2]},
    }


def test_unlike_conversions_are_an_error(folders, tmp_path):
    other = write_report(tmp_path / "c", 2, 0.0, steps=6)
    with pytest.raises(ValueError, match=r"is another conversion than .*: train.steps: 5 -> 6"):
        merge([*folders, other])


def test_curves_start_where_the_untrained_model_is(folders):
    axes = conversion_figure(merge(folders)).axes[0]
    curves = {line.get_label(): line.get_xydata() for line in axes.lines}
    np.testing.assert_allclose(curves["λ from 0 to 1"], [[0, 3.1], [2, 3.5], [4, 3.1]])
    np.testing.assert_allclose(curves["λ = 1 at once"], [[0, 5.0], [2, 3.9], [4, 3.2]])
    np.testing.assert_allclose(curves["dot product, trained on"][0], [0, 3.1])
    assert "2 seeds" in axes.get_title(loc="left")
