"""What a shared library defines and needs, as nm says."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def dynamic_symbols(library: Path, *, defined: bool) -> set[str]:
    """Return the names of a library's dynamic symbols, without their versions."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    kind = "--defined-only" if defined else "--undefined-only"
    done = subprocess.run(["nm", "-D", kind, str(library)], capture_output=True, text=True, check=True)
    return {line.split()[-1].split("@")[0] for line in done.stdout.splitlines()}


def assert_loadable_without_tensorrt(library: Path) -> None:
    """Assert that a plugin library exports its three entry points alone and asks nothing of libnvinfer."""
    assert dynamic_symbols(library, defined=True) == {"getCreators", "setLoggerFinder", "rotexport_judge"}
    needed = dynamic_symbols(library, defined=False)
    assert not [name for name in needed if "nvinfer" in name or name in {"getPluginRegistry", "getLogger"}]
