"""An output directory that exists completely or not at all."""

from __future__ import annotations

import json
import secrets
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from rotexport.errors import OutputError

MARK = "rotexport.json"  # what a finished build holds
MODEL = "model.onnx"
ROTATIONS = "rotations.bin"  # learned or read ones, as SpinQuant keeps them


class OutputDirectory:
    """Builds under a temporary name beside the final one, which it takes on success alone.

    Entering gives the temporary directory. An existing output is replaced, and only when everything went
    well, if `force` is set and it is empty or a build of ours; it is refused otherwise.

    Raises:
        OutputError: the output exists, or nothing can be written there.

    """

    def __init__(self, path: Path, *, force: bool = False) -> None:
        self.path = path
        self._force = force
        self._work: Path | None = None

    def check(self) -> None:
        """Raise OutputError before any work when the output could not be written at the end."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise OutputError(f"'{self.path}' exists and is a file; choose another output directory")
        if not self._force:
            raise OutputError(f"'{self.path}' already exists; pass --force to replace it, or choose another")
        if any(self.path.iterdir()) and not (self.path / MARK).is_file():
            raise OutputError(
                f"'{self.path}' is not a rotexport build: remove it yourself, or choose another"
            )

    def __enter__(self) -> Path:
        self.check()
        # Named before it exists: an interruption at any moment from here on finds what to remove.
        self._work = self.path.with_name(f".{self.path.name}.partial-{secrets.token_hex(4)}")
        try:
            self._work.mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"cannot write '{self.path}': {error.strerror}") from error
        except BaseException:
            self._discard()
            raise
        return self._work

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._work is not None
        try:
            if kind is None:
                replace_directory(self._work, self.path)
        finally:
            self._discard()

    def _discard(self) -> None:
        """Remove what is left of the unfinished build, if anything."""
        assert self._work is not None
        shutil.rmtree(self._work, ignore_errors=True)

    def keep_failed(self) -> Path:
        """Move what was built aside, for a person to look at, as `<output>.failed`; return where it is."""
        assert self._work is not None
        failed = self.path.with_name(f"{self.path.name}.failed")
        replace_directory(self._work, failed)
        return failed


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file completely or not at all.

    Raises:
        OutputError: it cannot be written.

    """
    temporary = path.with_name(f"{path.name}.partial")
    try:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        temporary.rename(path)
    except OSError as error:
        raise OutputError(f"cannot write '{path}': {error.strerror}") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read `rotexport.json` of a build.

    Raises:
        OutputError: there is none, or it is not one.

    """
    path = folder / MARK
    try:
        manifest = json.loads(path.read_text())
    except OSError as error:
        raise OutputError(f"'{folder}' is not a build: '{path}' cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise OutputError(f"'{path}' is not valid JSON ({error}); build again") from error
    if not isinstance(manifest, dict) or "rotexport" not in manifest:
        raise OutputError(f"'{path}' is not a manifest of rotexport; build again")
    return manifest


def replace_directory(new: Path, final: Path) -> None:
    """Move `new` to `final`; what was there goes only afterwards, and is put back if `new` cannot come."""
    old = final.with_name(f".{final.name}.old-{secrets.token_hex(4)}")
    try:
        try:
            if final.exists():
                final.rename(old)
            new.rename(final)
        except BaseException:
            if old.exists() and not final.exists():
                old.rename(final)
            raise
        finally:
            if final.exists():
                shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"cannot move the build to '{final}': {error.strerror}") from error
