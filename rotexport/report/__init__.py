"""The report of a build: its data, its page, and where both come from."""

from rotexport.report.data import BuildReport
from rotexport.report.files import read_report, write_report

__all__ = ["BuildReport", "read_report", "write_report"]
