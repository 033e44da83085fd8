"""`pytest --cpu-seconds`: what folders, files and the dearest tests cost, with the processes that they start, however busy it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import suppress

import psutil
import pytest

SHOWN = 30
BEFORE = pytest.StashKey[float]()


def used() -> float:
    """CPU seconds of this process and of all that descend from it, those that have ended too."""
    total = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])
    return total


class CpuSeconds:
    """Writes them into each test's last report, which workers of xdist send, and prints them at the end."""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        item.stash[BEFORE] = used()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if call.when == "teardown":
            report.user_properties.append(("cpu_seconds", used() - item.stash[BEFORE]))
        return report

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        spent, files, folders = Counter[str](), Counter[str](), Counter[str]()
        for report in (report for reports in terminalreporter.stats.values() for report in reports):
            for name, seconds in getattr(report, "user_properties", ()):
                if name == "cpu_seconds":
                    spent[report.nodeid] += seconds
                    file = report.nodeid.partition("::")[0]
                    files[file] += seconds
                    folders[file.rpartition("/")[0]] += seconds
        for title, rows in (("folder", folders.most_common()), ("file", files.most_common(SHOWN)), ("test", spent.most_common(SHOWN))):
            terminalreporter.section(f"CPU seconds by {title}, {sum(spent.values()):.1f} in all")
            for name, seconds in rows:
                terminalreporter.write_line(f"{seconds:8.1f}  {name}")
