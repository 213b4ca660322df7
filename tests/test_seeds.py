"""Several seeds of a recipe: bad words. tests/campaign/test_seeds_road.py runs some, killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.cli.main import main


@pytest.mark.parametrize("seeds", ["0,0", "-1", "x", "", "0", "0,,1", "0,9999999999"])
def test_bad_seeds_are_one_sentence(
    seeds: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[1])
    with pytest.raises(SystemExit) as ended:
        main(["seeds", "digits", f"--seeds={seeds}"])
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert "seed" in printed
    assert printed.count("\n") == 1
