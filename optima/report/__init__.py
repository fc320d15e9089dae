"""Reports a person wants to open: one HTML file per run, or one for several runs side by side.

A report is a function of the run directory alone, so it can be made again at any time. It holds everything it shows: no
script, no font, no image is fetched, and its content security policy forbids the browser to try.
"""

from optima.report.page import write_report
from optima.report.side_by_side import write_side_by_side

__all__ = ["write_report", "write_side_by_side"]
