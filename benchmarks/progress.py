"""A pytest plugin: one progress bar in place of dots. For ``-p``, with ``-s``."""

from __future__ import annotations

import pytest
from tqdm import tqdm


class Progress:
    def __init__(self) -> None:
        self.bar = tqdm(desc="time", unit="case")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.bar.reset(total=len(session.items))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.bar.set_postfix_str(nodeid.partition("::")[2])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            self.bar.update()

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        return ("passed", "", "") if report.passed else None

    def pytest_unconfigure(self) -> None:
        self.bar.close()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Progress())
