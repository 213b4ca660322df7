"""Debian's Chromium without a window, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

_PROGRAM = Path("/usr/bin/chromium")
_QUIET = ("gpu", "quic", "background-networking", "component-update", "sync")


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser; skips the test where it is not installed."""
    if not _PROGRAM.exists():
        pytest.skip(f"{_PROGRAM} is not there: apt-get install chromium")
    expect.set_options(timeout=60_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=_PROGRAM,
            args=["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in _QUIET)],
        )
        yield browser
        browser.close()
