"""A plugin of pytest (`-p bench.gpu.told`): a line of JSON a test as soon as it is over, with what it failed by."""

import json

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Told(config), "bench.gpu.told lines")


class _Told:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        words = "" if report.passed else str(crash.message if crash is not None else report.longrepr)
        told = {"test": report.nodeid, "outcome": report.outcome, "words": " ".join(words.split())[:400]}
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        terminal.write_line("")  # type: ignore[union-attr]
        terminal.write_line(json.dumps(told))  # type: ignore[union-attr]
