"""The emulator build, shared by all tests of the plugins."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PLUGINS = Path(__file__).parents[2] / "plugins"
for helpers in (Path(__file__).parent, PLUGINS / "bench", PLUGINS / "host", PLUGINS / "tools"):
    sys.path.insert(0, str(helpers))

from driver import Host  # noqa: E402


@pytest.fixture(scope="session")
def emulated() -> Path:
    """Return the directory of the libraries built for the emulator, built now if anything changed."""
    for tool in ("cmake", "ninja", "c++"):
        if shutil.which(tool) is None:
            pytest.fail(f"the emulator is built with {tool}, which is not on the PATH")
    build = PLUGINS / "build" / "emulator"
    configure = ["cmake", "-G", "Ninja", "-S", str(PLUGINS), "-B", str(build), "-DROTEXPORT_DEVICE=emulator"]
    headers = os.environ.get("TENSORRT_ROOT") or str(PLUGINS / "build" / "tensorrt")
    if Path(headers).is_dir():
        configure.append(f"-DTENSORRT_ROOT={headers}")
    build.mkdir(parents=True, exist_ok=True)
    with (build / "lock").open("w") as lock:  # workers that run tests side by side share the directory
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, ["cmake", "--build", str(build)]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return build


@pytest.fixture(scope="session")
def host(emulated: Path) -> Host:
    """Return what drives the plugin library, where it could be built."""
    if not (emulated / "librotexport_host.so").is_file():
        pytest.skip("TensorRT's headers are missing: python plugins/tools/fetch_tensorrt_headers.py")
    return Host(emulated)
