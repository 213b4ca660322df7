"""How far work is: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.system.progress import Bar, counted

ROOT = Path(__file__).resolve().parents[1]
WORK = """
import time
from pipeline.system.progress import Bar, counted
bar = Bar("training", "steps")
for step in range(7, 13):
    bar.show(step, 12, f"step {step}/12", f"bits/dim {step}.5")
    time.sleep(0.02)
    if step == 9:
        print("doctor: step 9: something", flush=True)
for _ in counted([(["a", "b"], None)] * 4, "scoring test", total=8):
    pass
Bar("sharding", "images").show(300)
raise SystemExit(2)
"""


def test_on_a_terminal_there_is_a_bar_and_the_cursor_comes_back() -> None:
    ours, theirs = pty.openpty()
    words = (sys.executable, "-c", WORK)
    settings = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    child = subprocess.Popen(words, cwd=ROOT, env=settings, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b""
    while True:
        try:
            said += os.read(ours, 2**16)
        except OSError:  # EIO: its end
            break
    os.close(ours)
    assert child.wait() == 2
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode())
    assert re.search(r"training ━+ 12/12 steps \S+/s 0:00:00 bits/dim 12\.5", text)
    assert re.search(r"scoring test ━+ 8/8 images", text) and "300/? images" in text
    assert "doctor: step 9: something\r\n" in text and "step 12/12\n" not in text
    assert said.count(b"\x1b[?25l") == said.count(b"\x1b[?25h") == 3


def test_elsewhere_there_are_lines_as_often_as_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("pipeline.system.progress.time.monotonic", lambda: now)
    with Bar("x.tar", "bytes", every=5) as slow, Bar("training", "steps") as always:
        for now in (1.0, 5.0, 6.0, 11.0):
            slow.show(now, 100, f"at {now:g}")
            always.show(now, 100)  # nothing to say
    assert capsys.readouterr().out == "at 5\nat 11\n"
    assert [*counted([(["a"], 1)], "scoring", total=1)] == [(["a"], 1)]
    assert capsys.readouterr().out == ""
