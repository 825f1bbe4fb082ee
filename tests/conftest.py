"Shared fixtures: golden files, and the table of measured differences printed at the end of a run."
import pytest

from tests.goldens import GoldenReport, load_golden

REPORT = GoldenReport()


@pytest.fixture(scope="session")
def golden_report():
    "Compare with reference numbers; every comparison becomes a row of the table at the end."
    return REPORT


@pytest.fixture(scope="session")
def golden():
    "`golden(system, name)` -> (tensors, header) of a fixture, or a skip that says what is missing."
    return load_golden


def pytest_terminal_summary(terminalreporter):
    if REPORT.rows:
        terminalreporter.section("golden parity: largest absolute difference")
        for line in REPORT.table():
            terminalreporter.write_line(line)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist hands its rows to the controller
        session.config.workeroutput["golden_rows"] = REPORT.rows


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    REPORT.rows += [tuple(row) for row in getattr(node, "workeroutput", {}).get("golden_rows", [])]
