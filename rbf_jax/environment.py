"""What a measurement must say of where it was made."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import jax

_PACKAGES = (
    "rbf-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "jax-triton",
    "triton",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "torch",
)


def describe() -> dict[str, Any]:
    """Returns the devices, the versions of Python and of what computes, and the time now (UTC)."""
    devices = jax.devices()
    name = _cpu() if devices[0].platform == "cpu" else devices[0].device_kind
    return {
        "device": name if len(devices) == 1 else f"{len(devices)} x {name}",
        "versions": {"python": platform.python_version(), **_versions()},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _cpu() -> str:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        model = models[0] if models else model
    return f"{model}, {os.cpu_count()} cores"


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        # One that is absent (a GPU machine without grain, say) is not in the list.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
