"""The page about all results: true to the files, safe with hostile ones, and right in a browser."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from chromium import chromium
from conftest import ROOT, Project, narrow
from playwright.sync_api import Browser

from pipeline import tracking
from pipeline.cli.main import main
from pipeline.params import Places, load_recipe
from pipeline.report import page
from pipeline.report.charts import Chart, Line
from pipeline.report.page import write_report
from pipeline.report.table2 import TABLE_2, data_set_of, why_not_comparable
from pipeline.services.definitions import free_ports
from pipeline.shards import Manifest, Split
from pipeline.studies.declaration import Study
from pipeline.studies.results import write_study
from pipeline.studies.shown import SHOWN
from vdvae.config import UserError

SCRIPT = "<script>alert(1)</script>"
PICTURE = "<img src=x onerror=alert(1)>"

Report = Callable[..., str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose digits went through all stages."""
    project = Project(tmp_path_factory.mktemp("report") / "project")
    project.set(narrow)
    stages = ("shard", "train", "evaluate", "sample", "register")
    lines = [f"from pipeline.stages.{name} import {name}; {name}('digits')" for name in stages]
    project.run(sys.executable, "-c", "\n".join(lines))
    return project.folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to change, as the current folder."""
    shutil.copytree(trained, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    for setting in ("VDVAE_STORE", "VDVAE_RUNS", "VDVAE_CACHE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(setting, raising=False)
    return tmp_path / "project"


@pytest.fixture
def report(folder: Path, capsys: pytest.CaptureFixture[str]) -> Report:
    """Runs the command; gives the page, and its notes where a list for them is given."""

    def run(*words: str, notes: list[str] | None = None) -> str:
        main(["report", *words])
        told = capsys.readouterr().err.splitlines()
        assert all(line.startswith("note: ") for line in told)
        if notes is None:
            assert told == []
        else:
            notes += told
        return (folder / "results/report.html").read_text(encoding="utf-8")

    return run


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as made:
        yield made


def read(path: str) -> Any:
    return json.loads(Path(path).read_text())


def write(path: str, change: Callable[[Any], object]) -> None:
    value = read(path)
    change(value)
    Path(path).write_text(json.dumps(value))


def test_settings_are_those_that_the_results_were_made_with(report: Report, folder: Path) -> None:
    """dvc.lock's, which has whole sections and single settings of a stage."""
    assert page._settings(load_recipe("digits"))["model.width"] == 12
    shutil.copy(ROOT / "dvc.lock", folder)
    settings = page._settings(load_recipe("digits"))
    assert [settings[k] for k in ("model.width", "train.steps", "evaluate.seed")] == [24, 2800, 0]
    report("--no-model")


def test_the_page_says_what_the_files_say(report: Report, folder: Path) -> None:
    page = html.unescape(report())
    for figures in read("results/digits/metrics.json").values():
        assert f"{figures['bits_per_dim']:.4f} ± {figures['bits_per_dim_se']:.4f}" in page
        assert f"rate {figures['rate_bits_per_dim']:.4f}" in page
        assert f"distortion {figures['distortion_bits_per_dim']:.4f}" in page
    conditions = read("results/digits/conditions.json")
    for fact in ("weights_sha256", "manifest_digest", "git_revision", "likelihood"):
        assert conditions[fact] in page
    registered = read("results/digits/registered.json")
    assert f"{registered['name']} version 1, alias champion" in page
    assert registered["mlflow_run_id"] in page

    # Five recipes of the paper, none of which was run here, have exactly its parameters.
    assert page.count(">not run<") == 5
    for exact in ("39,145,700", "119,280,868", "125,005,860", "114,874,852", "109,366,904"):
        assert f">{exact}<" in page
    for data in TABLE_2:
        assert f">{data.rows[-1].bits_per_dim}<" in page

    assert not re.search(r"(src|href|action|data)=[\"']?(?!data:|#)\w*[:/]", page)
    assert "<script" not in page
    assert str(folder.parent) not in page


def test_the_registration_of_another_model_is_not_shown(
    report: Report, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after `dvc exp apply`, which leaves the record that lay there before."""
    remedy = "not registered; run 'dvc repro -f -s register@digits'"
    run_id = read("results/digits/registered.json")["mlflow_run_id"]
    main(["show", "digits"])
    shown = capsys.readouterr().out
    assert "vdvae-digits version 1 (champion)" in shown and run_id in shown
    main(["show", "digits", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["registered"]["mlflow_run_id"] == run_id
    assert facts["test"] == read("results/digits/metrics.json")["test"]

    write(
        "results/digits/registered.json",
        lambda facts: facts.update(weights_sha256="0" * 64, mlflow_run_id="1" * 32),
    )
    main(["show", "digits"])
    shown = capsys.readouterr().out
    assert remedy in shown and "vdvae-digits" not in shown and "1" * 32 not in shown
    assert "note" not in shown
    notes: list[str] = []
    page = report("--no-model", notes=notes)
    assert [remedy.partition("; ")[2] in note for note in notes] == [True]
    assert ">not registered<" in page and "vdvae-digits version" not in page
    assert run_id in page and "1" * 32 not in page  # the training's own, which DVC keeps

    from pipeline.stages.register import register

    register("digits")  # finds it again
    assert "registered vdvae-digits version 1" in capsys.readouterr().out
    main(["show", "digits"])
    assert "vdvae-digits version 1 (champion)" in capsys.readouterr().out

    # Figures of another model than the one that was trained since are said to be that.
    write("results/digits/conditions.json", lambda facts: facts.update(weights_sha256="0" * 64))
    main(["show", "digits"])
    assert "these figures are not of the model that lies here now" in capsys.readouterr().out
    Path("results/digits/registered.json").write_text("[]")
    with pytest.raises(SystemExit) as ended:
        main(["show", "digits"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_it_is_logged_to_the_finished_run(report: Report) -> None:
    page = report("--no-model")
    places = Places.from_env()
    client = tracking.connect(places.tracking_uri)
    run_id = read("results/digits/registered.json")["mlflow_run_id"]
    logged = client.download_artifacts(run_id, "report.html")
    assert Path(logged).read_text(encoding="utf-8") == page
    assert client.get_run(run_id).info.status == "FINISHED"


def test_without_mlflow_the_page_is_written_and_one_line_says_so(
    report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    (port,) = free_ports(1)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    notes: list[str] = []
    page = report("--no-model", notes=notes)
    assert page.rstrip().endswith("</html>")
    assert len(notes) == 1
    assert "the page is not logged: MLflow at" in notes[0]


def test_what_is_missing_or_out_of_date_is_said(report: Report) -> None:
    def other_weights(conditions: dict[str, Any]) -> None:
        conditions["weights_sha256"] = "0" * 64

    write("results/digits/conditions.json", other_weights)
    shutil.rmtree("store")
    shutil.rmtree("cache")
    notes: list[str] = []
    page = report(notes=notes)
    assert "Out of date: the figures are not of the model that lies here now" in page
    assert page.count("Temperature ") == 2 * 3  # titles and text alternatives
    assert "Rate by layer: not here" in page
    assert len(notes) == 1
    assert "not all could be drawn" in notes[0] and "dvc repro -f -s shard@digits" in notes[0]

    for name in ("model", "curves.csv", "samples.png", "reconstructions.png", "registered.json"):
        path = Path("results/digits") / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = report()
    assert "dvc repro train@digits" in page
    assert "dvc repro sample@digits" in page
    assert "<img" not in page


@pytest.mark.parametrize("damage", ["{", "[]", '{"test": {"bits_per_dim": "1.8"}}'])
def test_damaged_figures_are_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    Path("results/digits/metrics.json").write_text(damage)
    with pytest.raises(SystemExit) as ended:
        main(["report"])
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: results/digits/metrics.json: ")
    assert printed.count("\n") == 1


def test_no_results_at_all_are_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree("results")
    with pytest.raises(SystemExit) as ended:
        main(["report"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: results: no recipe has any yet; run 'dvc repro'\n"
    assert not Path("results").exists()


def test_text_from_files_stays_text(report: Report, browser: Browser, folder: Path) -> None:
    source = {"terms": SCRIPT, "name": PICTURE}
    write("data/manifests/digits.json", lambda facts: facts["source"].update(source))
    write("results/digits/registered.json", lambda facts: facts.update(name=PICTURE))
    page = report("--no-model", notes=[])
    assert SCRIPT not in page and PICTURE not in page

    tab = browser.new_page()
    tab.on("dialog", lambda dialog: pytest.fail(dialog.message))
    tab.goto((folder / "results/report.html").as_uri())
    assert tab.locator("script, img[src=x]").count() == 0
    assert tab.get_by_text(PICTURE).first.is_visible()
    assert tab.get_by_text(SCRIPT).is_visible()
    tab.close()


def test_it_looks_right_on_screens_large_and_small_light_and_dark(
    report: Report, browser: Browser, folder: Path
) -> None:
    report()
    pages = []
    for scheme in ("light", "dark"):
        for width in (375, 1280):
            tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            asked: list[str] = []
            told: list[str] = []
            tab.on("request", lambda request, asked=asked: asked.append(request.url))
            tab.on("console", lambda message, told=told: told.append(message.text))
            address = (folder / "results/report.html").as_uri()
            tab.goto(address)
            tab.locator("summary").click()
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            sizes = tab.evaluate("[...document.images].map(image => image.naturalWidth)")
            assert len(sizes) == 4 and min(sizes) > 0
            assert tab.locator("img:not([alt]), svg.chart:not([aria-label])").count() == 0
            assert tab.locator("svg.chart").count() == 7
            assert [url for url in asked if not url.startswith("data:")] == [address]
            assert told == []
            pages.append(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
            tab.close()
    assert pages[0] == pages[1] != pages[2] == pages[3]


def study_row(variant: str, seed: int, bits: float) -> dict[str, Any]:
    """What `read_cell` gives of a cell."""
    figures = {"bits_per_dim": bits, "bits_per_dim_se": 0.01}
    return {
        "recipe": load_recipe("digits"), "variant": variant, "seed": seed, "experiment": "e",
        "steps": 4, "mlflow_run_id": None, "skipped": 0, "minutes": 0.1,
        "validation": figures, "test": figures,
        "conditions": {
            "manifest_digest": "d", "data": "e" * 64, "precision": "fp32", "device": "cpu",
        },
        "scores": {f"image-{n}": bits + n / 1000 for n in range(9)},
        "rates": {
            "rate_bits_per_dim_by_layer": [
                {"resolution": 1, "rate_bits_per_dim": 0.001},
                {"resolution": 8, "rate_bits_per_dim": 1.0},
            ],
            "rate_bits_per_dim_by_resolution": {"1": 0.001, "8": 1.0},
        },
        "curves": [{"step": s, "time": s, "train/gradient_norm": 2.0**s} for s in (1, 2)],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("shows", "column"),
    [
        ("bits", {}),
        ("rates", {"layers under 0.1 nats an image, of 2": [1, 1]}),  # of 64 * 0.001 * ln 2
        ("resolutions", {"share of latents at 8x8": [64 / 65] * 2}),
        ("gradients", {"gradient norm, median": [3.0, 3.0]}),
    ],
)
def test_a_study_has_its_claim_figure_table_and_verdict(
    report: Report, browser: Browser, folder: Path, monkeypatch: pytest.MonkeyPatch,
    shows: str, column: dict[str, list[float]],
) -> None:  # fmt: skip
    # What draws with a model is run in test_studies: these rows have none.
    monkeypatch.setitem(SHOWN, shows, replace(SHOWN[shows], draw=lambda *_: None))
    study = Study.model_validate(
        {
            "claim": "Depth <helps>", "paper": "Table 1", "recipe": "digits", "seeds": [0, 1],
            "variants": {"deep": {}, "flat": {}}, "compare": [["deep", "flat"]], "shows": shows,
        }
    )  # fmt: skip
    bits = {"deep": 1.8, "flat": 1.9}
    rows = [study_row(v, seed, bits[v] + seed / 1e4) for seed in (0, 1) for v in bits]
    places = replace(Places.from_env(), results_root=folder / "results")
    place = write_study(study, "depth", False, rows, places)
    found = json.loads((place / "table.json").read_text())["variants"]["deep"]["shown"]
    assert column.items() <= found.items()
    report("--no-model")
    tab = browser.new_page(viewport={"width": 375, "height": 900})
    tab.goto((folder / "results/report.html").as_uri())
    section = tab.get_by_role("region", name="Study: depth")
    text = section.inner_text()
    assert "Depth <helps>" in text and "Supported on these data at 95%" in text
    assert "+0.1000" in text and "1.8001 ± 0.0001" in text
    assert all(heading in text for heading in found)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 375
    picture = section.locator("img")
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 100
    tab.close()
    (place / "table.json").write_text("{}")
    with pytest.raises(UserError, match=r"depth/table\.json: is no study's table"):
        write_report(Places.from_env(), print)


def test_only_like_is_compared_with_the_paper(trained: Path) -> None:
    digits = Manifest.load(trained / "data/manifests/digits.json")

    def reason(source: str, size: int, levels: int, images: int, likelihood: str) -> str:
        data = data_set_of(source, size)
        assert data is not None
        test = Split(images=images, shards=())
        facts = digits.model_copy(update={"num_levels": levels, "splits": {"test": test}})
        return why_not_comparable(data, facts, likelihood)

    assert data_set_of("digits", 8) is None
    assert data_set_of("folder", 32) is None  # CIFAR-10's size is not CIFAR-10
    assert reason("cifar10", 32, 256, 10_000, "normalised") == ""
    assert "9,984 test images" in reason("cifar10", 32, 256, 9_984, "normalised")
    assert "50,000 test images" in reason("imagenet", 32, 256, 50_000, "published")
    assert reason("ffhq", 256, 32, 7_000, "published_5bit") == ""
    assert "do not sum to 1" in reason("ffhq", 256, 32, 7_000, "normalised")
    assert "256 levels" in reason("ffhq", 256, 256, 7_000, "published")


@pytest.mark.parametrize("log", [False, True])
def test_charts_keep_every_finite_point_in_the_frame(log: bool) -> None:
    values = [10.0 ** (step % 7) for step in range(1000)]
    values[3], values[4], values[5] = math.inf, math.nan, 1e15
    line = Line(name="a < b", points=list(enumerate(values)), thin=max)
    chart = Chart(title="T", y_label="y", lines=[line], log=log, levels=[("limit", 400.0)])
    [axes] = chart.figure().axes
    points = axes.lines[0].get_xydata()
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert len(points) <= 400
    assert all(left <= x <= right and low <= y <= high for x, y in points)
    assert points[-1][0] == right == 999
    assert max(y for _, y in points) == 1e15  # the highest is not thinned
    root = ElementTree.fromstring(chart.svg())
    assert root.attrib["aria-label"] == "T: a < b ends at 1e+05."
    assert Chart(title="T", y_label="y", lines=[Line(name="none", points=[])]).svg() == ""
