"""For `python -m pytest -p tests.at_once`: what failed is told when it fails, so that a run that is cut off has said it."""

from typing import Any

import pytest


class AtOnce:
    def __init__(self, terminal: Any):
        self.terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.terminal.write_line(f"\n{report.nodeid} failed:\n{report.longreprtext[-4000:]}")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if terminal := config.pluginmanager.get_plugin("terminalreporter"):
        config.pluginmanager.register(AtOnce(terminal))
