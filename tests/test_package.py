"""What `import rbf_jax` brings along, and what version it says it is."""

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rbf_jax

ROOT = Path(__file__).parents[1]
# Of other layers, or slow to import; the operation takes jax_triton and triton where it needs them.
TENSORS = {"jax_triton", "triton", "tensorflow", "torch"}
STACK = {"flax", "grain", "matplotlib", "ml_collections", "optax", "orbax", "tokenizers"}


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("rbf_jax", TENSORS | STACK),
        ("rbf_jax.ops.decode", TENSORS | STACK),
        ("rbf_jax.nn", TENSORS | STACK - {"flax"}),
        ("rbf_jax.data", TENSORS | STACK),
        ("rbf_jax.training", TENSORS),
    ],
)
def test_imports_no_more_than_it_needs(module, unwanted):
    code = f"import sys, json, {module}; print(json.dumps(sorted(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert not unwanted & set(json.loads(ran.stdout))


def test_version_is_the_installed_one_and_has_its_changes():
    assert rbf_jax.__version__ == importlib.metadata.version("rbf-jax")
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## \[?{re.escape(rbf_jax.__version__)}\b", changes, re.MULTILINE)
