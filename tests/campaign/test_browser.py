"""An engineer at the pages: starts runs from a form, watches, cancels, resumes, finds the model."""

from __future__ import annotations

import base64
import csv
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from chromium import chromium
from PIL import Image, ImageDraw
from playwright.sync_api import Locator, Page, expect
from services_project import Services

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]

STEPS, LONG = 8, 24  # of the run that is left alone, and of the one that is cancelled


def photographs(folder: Path, count: int) -> Path:
    """Images that are to a model what photographs are: smooth light, edges and grain."""
    folder.mkdir(parents=True)
    y, x = np.mgrid[0:1:256j, 0:1:256j][..., None]
    for index in range(count):
        rng = np.random.default_rng(index)
        light, across, down = rng.uniform(0, 255, (3, 3))
        picture = Image.fromarray(np.uint8((light + across * x + down * y) / 3))
        draw = ImageDraw.Draw(picture)
        for _ in range(5):
            left, top, wide, high = map(int, rng.integers(20, 160, 4))
            shape = (draw.ellipse, draw.rectangle)[rng.integers(2)]
            shape((left, top, left + wide, top + high), tuple(map(int, rng.integers(0, 256, 3))))
        grain = np.asarray(picture) + rng.normal(0, 6, (256, 256, 3))
        Image.fromarray(np.uint8(grain.clip(0, 255))).save(folder / f"{index:03}.jpg")
    return folder


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    made = Services(tmp_path / "project")
    made.environment["VDVAE_DATA_ROOTS"] = str(tmp_path)
    made.services("start")
    yield made
    made.services("stop")


@pytest.fixture
def page() -> Iterator[Page]:
    """A browser's page; it may have asked this machine alone for anything."""
    with chromium() as browser:
        made = browser.new_page(viewport={"width": 1280, "height": 1000})
        made.set_default_timeout(60_000)
        asked: list[str] = []
        made.context.on("request", lambda request: asked.append(request.url))
        yield made
    hosts = {urlsplit(url).hostname for url in asked if not url.startswith(("data:", "blob:"))}
    assert hosts == {"127.0.0.1"}


def shot(page: Page, name: str, height: int = 1000) -> None:
    """Keeps the page as it is for the documentation, where VDVAE_SCREENSHOTS names a folder."""
    if folder := os.environ.get("VDVAE_SCREENSHOTS"):
        page.set_viewport_size({"width": 1280, "height": height})
        page.wait_for_timeout(1500)  # what moves comes to rest
        picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        few = picture.quantize(255, dither=Image.Dither.NONE)
        few.save(Path(folder) / f"ui-{name}.png", optimize=True)
        page.set_viewport_size({"width": 1280, "height": 1000})


def field(page: Page, name: str) -> Locator:
    label = page.locator("label", has_text=f"{name} (Optional)")
    return page.locator(".p-label").filter(has=label)


def start(page: Page, services: Services, **values: str) -> None:
    """Fills the form of ffhq256, submits it and goes to the run's page."""
    server = f"http://127.0.0.1:{services.prefect_port}"
    page.goto(server)
    page.get_by_text("Deployments", exact=True).click()
    page.get_by_role("link", name="ffhq256", exact=True).click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("Custom run").click()
    field(page, "preset").locator(".p-select-button__control").press("ArrowDown")
    page.locator(".p-select-option").get_by_text("smoke", exact=True).click()
    own = "the recipe's own, 1,700,000 (smoke: 30)"  # what a field that is left alone means
    expect(field(page, "steps")).to_contain_text(own)
    for name, value in values.items():
        field(page, name).locator("input, textarea").fill(value)
    shot(page, "form", height=1850)
    for _ in range(5):
        with page.expect_response("**/create_flow_run") as answer:
            page.get_by_role("button", name="Submit").click()
        if answer.value.status != 503:  # the server's database is busy: press it again
            break
    assert answer.value.ok, answer.value.text()
    # The button to the run's page sits in a message that moves and goes.
    page.goto(f"{server}/runs/flow-run/{answer.value.json()['id']}")
    named = page.get_by_text(f"ffhq256-smoke-seed{values['seed']}").first
    expect(named).to_be_visible(timeout=120_000)


def steps_shown(page: Page) -> list[int]:
    text = page.locator("body").inner_text()
    return [int(step) for step in re.findall(r"^step (\d+)/", text, re.MULTILINE)]


def watch(page: Page, enough: Callable[[list[int]], bool]) -> list[int]:
    """The steps in the log, which the page renews by itself, once there are enough of them."""
    deadline = time.monotonic() + 240
    while not enough(steps := steps_shown(page)):
        assert time.monotonic() < deadline, page.locator("body").inner_text()
        page.wait_for_timeout(200)
    assert steps == sorted(set(steps))
    return steps


def ends(page: Page, state: str) -> None:
    badge = page.locator(".state-badge").first
    expect(badge).to_have_text(re.compile("Completed|Failed|Crashed|Cancelled"), timeout=400_000)
    expect(badge).to_have_text(state)


def artifact(page: Page, name: str) -> None:
    page.get_by_text("Artifacts", exact=True).last.click()
    page.get_by_role("link").filter(has_text=f"ffhq256-{name}").click()
    page.wait_for_url("**/artifacts/artifact/**")


def picture(page: Page) -> np.ndarray[Any, Any]:
    """The pixels of the one picture on the page, which the browser shows too."""
    image = page.locator("img[src^='data:image/png']")
    expect(image).to_be_visible()
    height, width = image.evaluate("image => [image.naturalHeight, image.naturalWidth]")
    content = base64.b64decode(str(image.get_attribute("src")).partition(",")[2])
    pixels = np.asarray(Image.open(io.BytesIO(content)))
    assert pixels.shape == (height, width, 3)
    return pixels


def test_an_engineer_starts_watches_cancels_and_resumes(
    services: Services, page: Page, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    folder = photographs(tmp_path / "photographs", 64)
    values = {"data": folder.as_uri()}

    # A run that is left alone: rising steps, then pictures, then a version of the model.
    start(page, services, **values, steps=str(STEPS), seed="301")
    watch(page, lambda steps: len(steps) >= 3)
    shot(page, "running", height=1900)
    ends(page, "Completed")
    run_page = page.url
    page.get_by_text("Artifacts", exact=True).last.click()
    shot(page, "finished")
    shown = {}
    for name in ("samples", "reconstructions"):
        page.goto(run_page)
        artifact(page, name)
        shown[name] = picture(page)
    shot(page, "reconstructions")
    page.goto(run_page)
    artifact(page, "registered-version")
    with page.expect_popup() as opened:
        page.get_by_role("link", name="vdvae-ffhq256 version 1, champion").click()
    expect(opened.value.get_by_role("heading", name="Version 1")).to_be_visible()
    opened.value.close()

    # A run that is cancelled in the middle; the same form again goes on from there.
    values |= {"steps": str(LONG), "seed": "302"}
    start(page, services, **values)
    seen = watch(page, bool)
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.get_by_role("button", name="Confirm", exact=True).click()
    ends(page, "Cancelled")
    assert max(steps_shown(page)) < LONG
    start(page, services, **values)
    resumed = page.get_by_text(re.compile(rf"^resuming at step \d+/{LONG}$"))
    expect(resumed).to_be_visible(timeout=120_000)
    checkpoint = int(re.findall(r"\d+", resumed.inner_text())[0])
    assert seen[-1] <= checkpoint < LONG
    assert watch(page, bool)[0] > checkpoint
    ends(page, "Completed")

    # Both are in `dvc exp show`, in MLflow and in the registry, with the same figures.
    words = ("exp", "show", "--csv", "--no-pager")
    table = csv.DictReader(io.StringIO(services.run(sys.executable, "-m", "dvc", *words)))
    experiments = {row["recipes.ffhq256.train.seed"]: row for row in table if row["rev"]}
    client = MlflowClient(f"http://127.0.0.1:{services.mlflow_port}")
    for number, seed, steps in (("1", "301", STEPS), ("2", "302", LONG)):
        experiment = experiments[seed]
        assert experiment["Experiment"].startswith(f"ffhq256-smoke-seed{seed}-")
        assert experiment["recipes.ffhq256.train.steps"] == str(steps)
        version = client.get_model_version("vdvae-ffhq256", number)
        run = client.get_run(version.run_id)
        assert run.info.status == "FINISHED"
        assert run.data.params["train.seed"] == seed
        for figure in (run.data.metrics["test/bits_per_dim"], version.tags["test_bits_per_dim"]):
            assert float(figure) == pytest.approx(float(experiment["test.bits_per_dim"]), abs=1e-4)
        if number == "1":
            for name, pixels in shown.items():
                made = client.download_artifacts(version.run_id, f"pictures/{name}.png")
                assert np.array_equal(np.asarray(Image.open(made)), pixels)
    assert services.run("git", "status", "--porcelain") == ""

    page.goto(f"http://127.0.0.1:{services.mlflow_port}/#/models/vdvae-ffhq256")
    for number in ("1", "2"):
        expect(page.get_by_role("link", name=f"Version {number}")).to_be_visible()
    page.get_by_role("button", name="Close", exact=True).click()  # MLflow's assistant
    shot(page, "registry")
