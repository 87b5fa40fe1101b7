"""Lists what a plugin library registers, through TensorRT's own registry.

The library is loaded in a process of its own: it stays loaded until that process ends, and a broken library
cannot take the caller along. Needs no GPU. `python -m rotexport.plugins.creators LIBRARY` is that process.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rotexport.errors import GraphError, TargetError
from rotexport.graph.functions import DOMAIN, load_function

VERSION = "1"


@dataclass(frozen=True)
class Creator:
    """One plugin: its operator, and the fields it is created from."""

    name: str
    version: str
    namespace: str
    fields: tuple[str, ...]


def list_creators(library: Path) -> list[Creator]:
    """Return the creators in namespace `rotexport` that the library registers, by name.

    Raises:
        TargetError: there is no such file, no TensorRT to load it with, or it does not load.

    """
    if not library.is_file():
        raise TargetError(f"no plugin library at {library}: build it with 'rotexport plugins build'")
    command = [sys.executable, "-m", "rotexport.plugins.creators", str(library.resolve())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or [f"the process ended with {done.returncode}"]
        raise TargetError(f"{library} does not load as a plugin library: {reason[0]}")
    listed = json.loads(done.stdout.splitlines()[-1])
    return [
        Creator(entry["name"], entry["version"], entry["namespace"], tuple(entry["fields"]))
        for entry in listed
    ]


def test_library(library: Path) -> list[Creator]:
    """Check that every plugin of a library stands for an operator with a body, with the same attributes.

    Raises:
        TargetError: the library does not load, registers nothing, or disagrees with the operators' bodies.

    """
    creators = list_creators(library)
    if not creators:
        raise TargetError(f"{library} registers no plugin in namespace '{DOMAIN}'")
    for creator in creators:
        try:
            attributes = set(load_function(creator.name).attribute)
        except GraphError as error:
            raise TargetError(f"{library} registers '{creator.name}': {error}") from error
        if creator.version != VERSION:
            raise TargetError(
                f"plugin '{creator.name}' has version '{creator.version}', nodes ask for '{VERSION}'"
            )
        if set(creator.fields) != attributes:
            raise TargetError(
                f"plugin '{creator.name}' has fields {sorted(creator.fields)}, "
                f"its operator has {sorted(attributes)}"
            )
    return creators


def _tensorrt() -> Any:
    for name in ("tensorrt", "tensorrt_rtx"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise SystemExit("neither tensorrt nor tensorrt_rtx is installed")


def _main(library: str) -> None:
    tensorrt = _tensorrt()
    registry = tensorrt.get_plugin_registry()
    if registry.load_library(library) is None:
        raise SystemExit("TensorRT's registry refuses it")
    entries = [
        {
            "name": creator.name,
            "version": creator.plugin_version,
            "namespace": creator.plugin_namespace,
            "fields": [field.name for field in creator.field_names],
        }
        for creator in registry.all_creators
        if creator.plugin_namespace == DOMAIN
    ]
    print(json.dumps(sorted(entries, key=lambda entry: str(entry["name"]))))


if __name__ == "__main__":
    _main(sys.argv[1])
