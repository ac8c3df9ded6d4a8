"""The last lines of a test run: what was skipped, and how to have it tested."""

from __future__ import annotations

from tests.not_tested import not_tested


def test_each_kind_of_lack_has_one_line_with_the_way_to_get_it() -> None:
    browser, peft = "Skipped: no browser is installed: apt-get install chromium", "Skipped: could not import 'peft': No"
    assert not_tested([browser, peft, browser, "Skipped: only Linux tells"]) == [
        "not tested: 2 tests, for want of a browser; to have it: apt-get install chromium",
        "not tested: 1 test, for want of packages of requirements-dev.txt; to have it: make test",
        "not tested: 1 test, only Linux tells",
    ]
    assert not_tested([]) == []
