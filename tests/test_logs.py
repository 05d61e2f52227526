from __future__ import annotations

import logging

import pytest

from quire.logs import ThrottledLog


def test_one_line_a_second_and_a_count_of_the_others(caplog: pytest.LogCaptureFixture) -> None:
    now = 100.0
    log = ThrottledLog(logging.getLogger("quire.test"), 1.0, lambda: now)
    for number in range(5):
        log.warning(f"event {number}")
        now += 0.1
    now += 0.6
    log.warning("event 5")
    now += 5
    log.warning("event 6")
    assert [record.getMessage() for record in caplog.records] == ["event 0", "event 5 (4 more since the last such line)", "event 6"]
