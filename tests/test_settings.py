"""The environment's settings: what they accept, what `vdvae settings` says, the table in docs/."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipeline import services
from pipeline.cli import main
from pipeline.services import commands
from pipeline.settings import Settings, variable
from vdvae import UserError

ROOT = Path(__file__).resolve().parents[1]
BAD = {
    "VDVAE_CACHE_GIB": "-1",
    "VDVAE_READ_WORKERS": "1.5",
    "VDVAE_RANKS": "0",
    "VDVAE_SHARD_WORKERS": "1025",
    "VDVAE_GRACE_SECONDS": "inf",
    "VDVAE_TRACKING_SECONDS": "nan",
    "VDVAE_PREFECT_PORT": "65536",
    "VDVAE_MLFLOW_PORT": "9" * 5000,
    "VDVAE_S3_PORT": "http://[",
    "VDVAE_HOST": "localhost",
    "VDVAE_S3": "2",
    "VDVAE_RUNS_AT_ONCE": "many",
}


def test_every_setting_that_our_modules_name_is_declared() -> None:
    ours = {"FLOW_RUN", "EVENTS", "RENDEZVOUS", "FLOW", "SERVICES"}  # between processes
    declared = {variable(name) for name in Settings.model_fields}
    for path in (*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("vdvae/*.py")):
        named = set(re.findall(r"VDVAE_(\w+[A-Z0-9])\b", path.read_text())) - ours
        assert {f"VDVAE_{name}" for name in named if name != "COMPLETE"} <= declared, path


@pytest.mark.parametrize(("name", "value"), BAD.items())
def test_a_bad_value_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        Settings()
    said = str(caught.value)
    assert re.fullmatch(rf"{name}: '.*' is not .*; set it to that, or unset it for \S.*", said)
    assert len(said) < 300


def test_an_option_of_nought_is_a_value_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VDVAE_PREFECT_PORT", "4201")
    monkeypatch.setattr(commands, "start", lambda settings: pytest.fail(f"{settings} will do"))
    with pytest.raises(UserError, match=r"^VDVAE_PREFECT_PORT: '0' is not "):
        services.run("start", prefect_port=0, mlflow_port=None, s3=False)


def test_a_secret_is_in_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VDVAE_AUTH", "hunter2")
    with pytest.raises(UserError, match=r"^VDVAE_AUTH: is not of the form user:password; ") as no:
        Settings()
    assert "hunter2" not in str(no.value)


def test_they_are_read_at_the_call_and_an_empty_one_is_not_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for text, expected in (("3", 3), ("", None), ("4", 4)):
        monkeypatch.setenv("VDVAE_RANKS", text)
        assert Settings().ranks == expected
    assert "ranks" in Settings().model_fields_set and "runs" not in Settings().model_fields_set


def test_the_command_shows_what_is_in_effect_and_no_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VDVAE_AUTH", "me:hunter2")
    monkeypatch.setenv("VDVAE_SERVE_TOKEN", "hunter2" * 3)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@host:5000")
    monkeypatch.setenv("VDVAE_RANKS", "3")
    monkeypatch.setenv("VDVAE_STROE", "file:///x")
    main(["settings"])
    printed = capsys.readouterr().out
    assert "hunter2" not in printed and "\x1b" not in printed
    assert re.search(r"(?m)^VDVAE_RANKS +3 +one per visible GPU.*  processes that train", printed)
    assert re.search(r"(?m)^MLFLOW_TRACKING_URI +http://\*{4}@host:5000 ", printed)
    assert re.search(rf"(?m)^VDVAE_RUNS +{tmp_path}/runs +<project>/runs ", printed)
    assert printed.endswith("note: VDVAE_STROE: is set, and no setting of this name is known\n")
    main(["settings", "--json"])
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == {variable(name) for name in Settings.model_fields}
    assert (rows["VDVAE_RANKS"]["value"], rows["VDVAE_RANKS"]["set"]) == ("3", True)
    assert rows["VDVAE_AUTH"]["value"] == "****" and not rows["VDVAE_RUNS"]["set"]


def test_the_table_in_docs_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    main(["settings", "--markdown"])
    page = (ROOT / "docs/settings.md").read_text()
    _, _, rest = page.partition("<!-- settings -->\n")
    assert rest.partition("<!-- /settings -->")[0] == capsys.readouterr().out, (
        "put what 'vdvae settings --markdown' prints between the marks of docs/settings.md"
    )
