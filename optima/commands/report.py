"""The command `report`: pages drawn again of what runs have left."""

from pathlib import Path

from optima.commands.compare.runs import ASKED, draw_comparison
from optima.commands.options import ReportConfig
from optima.report import write_report, write_side_by_side


def run_report(config: ReportConfig) -> None:
    """Draws the report of one run, a comparison, or several runs side by side."""
    if len(config.run) > 1:
        page = write_side_by_side(config.run, config.output or Path("side_by_side.html"))
    elif (config.run[0] / ASKED).exists():
        page = draw_comparison(config.run[0], config.output)
    else:
        page = write_report(config.run[0], config.output)
    print(f"wrote {page}")
