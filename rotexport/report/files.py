"""A report on disk: its data as `report.json`, its page as `report.html`."""

from __future__ import annotations

import json
from pathlib import Path

from rotexport.errors import OutputError
from rotexport.report.data import BuildReport
from rotexport.report.page import render
from rotexport.report.serialize import from_plain, to_plain


def write_report(report: BuildReport, directory: Path) -> None:
    """Write `report.json` and `report.html` into a build's directory.

    Raises:
        OutputError: the directory cannot be written.

    """
    text = json.dumps(to_plain(report), indent=1, allow_nan=False)
    for name, content in (("report.json", text + "\n"), ("report.html", render(report))):
        path = directory / name
        temporary = path.with_suffix(path.suffix + ".partial")
        try:
            temporary.write_text(content, encoding="utf-8")
            temporary.rename(path)
        except OSError as error:
            raise OutputError(f"cannot write '{path}': {error.strerror}") from error


def read_report(directory: Path) -> BuildReport:
    """Read what `write_report` wrote.

    Raises:
        OutputError: there is no report, or it is not one of this version.

    """
    path = directory / "report.json"
    try:
        return from_plain(BuildReport, json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise OutputError(
            f"cannot read '{path}': {error.strerror}; is this the directory of a build?"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise OutputError(
            f"'{path}' is not a report of this version of rotexport ({error}); build again"
        ) from error
