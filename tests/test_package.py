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
SOURCES = {"array_record", "pyarrow", "tensorflow_datasets", "tqdm"}


# From the least to the most, so that one process can import one after the other.
UNWANTED = {
    "rbf_jax": TENSORS | STACK,
    "rbf_jax.ops.decode.api": TENSORS | STACK,
    "rbf_jax.data": TENSORS | STACK | SOURCES,
    "rbf_jax.nn": TENSORS | STACK - {"flax"},
    "rbf_jax.training": TENSORS,
}


@pytest.fixture(scope="module")
def imported():
    """What has been imported after each module."""
    code = (
        "import importlib, json, sys\n"
        "for module in sys.argv[1:]:\n"
        "    importlib.import_module(module)\n"
        "    print(json.dumps(sorted(sys.modules)))"
    )
    command = [sys.executable, "-c", code, *UNWANTED]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
    return dict(zip(UNWANTED, map(json.loads, ran.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("module", UNWANTED)
def test_imports_no_more_than_it_needs(module, imported):
    assert module in imported[module]
    assert not UNWANTED[module] & set(imported[module])


def test_version_is_the_installed_one_and_has_its_changes():
    assert rbf_jax.__version__ == importlib.metadata.version("rbf-jax")
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## \[?{re.escape(rbf_jax.__version__)}\b", changes, re.MULTILINE)
