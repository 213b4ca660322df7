"""What `vdvae gc` frees and, above all, what it never does; git, DVC, MLflow and S3 are real."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from registry_project import Project

from pipeline import tracking
from pipeline.commands import space
from pipeline.params import Places, load_recipe
from pipeline.shards import SPLITS, Manifest, ShardReader, write_shards
from pipeline.sources import open_source
from pipeline.storage import FileStore, open_store
from pipeline.system.process import exclusive_lock
from vdvae.config import UserError

pytestmark = pytest.mark.integration

MANIFEST = Path("data/manifests/tiny.json")
DAY = 86400
PARAMS = """
active: [tiny]
active_studies: []
recipes:
  tiny:
    data: {source: digits, image_size: 8, channels: 1, num_levels: 17, validation: 180, test: 360,
      shard_images: %d}
    model: {encoder: "8x1,8d4,2x1", decoder: "2x1,8m2", width: 8, latent_channels: 2, mixtures: 2}
    train: {steps: 2, batch_size: 2, learning_rate: 0.001}
"""


def run(*words: str) -> str:
    path = os.pathsep.join([os.environ["WARM_PYTHON"], os.environ["PATH"]])
    env = {**os.environ, "CI": "true", "PATH": path}
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def dvc(*words: str) -> str:
    return run(str(Path(os.environ["WARM_PYTHON"], "python")), "-m", "dvc", *words)


def commit(branch: str) -> None:
    run("git", "checkout", "-q", "-B", branch)
    run("git", "add", "-A")
    run("git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qm", branch)


@pytest.fixture(scope="module")
def empty_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of git and DVC to copy."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        for package in ("vdvae", "pipeline"):  # dependencies of the stages
            Path(package).symlink_to(ROOT / package)
        Path("dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
        Path("params.yaml").write_text(PARAMS % 1000)
        Path(".gitignore").write_text("/store\n/runs\n/mlruns\n/results\n/vdvae\n/pipeline\n")
        run("git", "init", "-q", "-b", "main")
        dvc("init", "-q")
        commit("main")
    return folder


@pytest.fixture
def project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_project: Path, empty_store: Path
) -> Places:
    """A project without data, in the current folder; other tests of this machine are none of it."""
    shutil.copytree(empty_project, tmp_path / "project", symlinks=True)
    monkeypatch.chdir(tmp_path / "project")
    for setting in ("VDVAE_STORE", "VDVAE_RUNS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(setting, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    Path("mlruns").mkdir()
    shutil.copy(empty_store, "mlruns/mlflow.db")
    assert space.cache_folder() == Path(".dvc/cache").resolve()
    monkeypatch.setattr(space, "cache_folder", Path(".dvc/cache").resolve)  # DVC takes a second
    found = space._workplaces
    monkeypatch.setattr(
        space, "_workplaces", lambda: {f for f in found() if f.is_relative_to(tmp_path)}
    )
    return Places.from_env()


def shards(places: Places, shard_images: int) -> Manifest:
    """Puts the digits into the store, with so many in a shard, and leaves no manifest of it."""
    Path("params.yaml").write_text(PARAMS % shard_images)
    data, path = load_recipe("tiny").data, Path("elsewhere.json")
    source = open_source("tiny", data)
    manifest = write_shards("tiny", data, source, open_store(places.store_url), path)
    path.unlink()
    return manifest


def keys(places: Places) -> set[str]:
    return {stored.key for stored in open_store(places.store_url).list()}


def keys_of(*manifests: Manifest) -> set[str]:
    return {s.key for m in manifests for split in m.splits.values() for s in split.shards}


def make_old(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets two days go by."""
    store = open_store(places.store_url)
    if isinstance(store, FileStore):
        for stored in store.list():
            os.utime(store.folder / stored.key, (time.time() - 2 * DAY,) * 2)
    else:  # a server has its own clock
        later = time.time() + 2 * DAY
        monkeypatch.setattr(space.time, "time", lambda: later)


def register_one(places: Places) -> Manifest:
    """A version of a model of the digits; its manifest is then nowhere but in the registry."""
    manifest = shards(places, 400)
    recipe = load_recipe("tiny")
    MANIFEST.parent.mkdir(parents=True, exist_ok=True)
    write_shards("tiny", recipe.data, open_source("tiny", recipe.data),
                 open_store(places.store_url), MANIFEST)  # fmt: skip
    project = Project()
    project.write_results(weights=0, bits=2.0)
    assert project.register().version == 1
    MANIFEST.unlink()
    return manifest


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_only_what_nothing_needs_is_removed(project, monkeypatch, request, capsys, kind):
    if kind == "s3":
        monkeypatch.setenv("VDVAE_STORE", request.getfixturevalue("s3_url"))
    places = Places.from_env()
    store = open_store(places.store_url)
    registered = register_one(places)
    nobodys = shards(places, 1200)
    Path("params.yaml").write_text(PARAMS % 600)
    dvc("repro", "-q", "-s", "shard@tiny")
    other = Manifest.load(MANIFEST)
    commit("other")
    run("git", "checkout", "-q", "main")
    Path("params.yaml").write_text(PARAMS % 500)
    dvc("repro", "-q", "-s", "shard@tiny")
    current = Manifest.load(MANIFEST)
    commit("main")
    store.put("notes/readme.txt", b"somebody's own")
    everything = keys(places)
    sets = [keys_of(m) for m in (registered, nobodys, other, current)]
    only_nobodys = sets[1] - sets[0] - sets[2] - sets[3]
    assert only_nobodys and sets[2] - sets[0] - sets[3] and sets[0] - sets[2] - sets[3]

    space.gc(older_than_hours=24, yes=True)
    assert keys(places) == everything  # all is young: a writer may be at work
    make_old(places, monkeypatch)
    capsys.readouterr()
    space.gc(older_than_hours=24, yes=False)
    dry = capsys.readouterr().out
    assert f"shards of tiny, {len(only_nobodys)}: no manifest lists them" in dry
    assert "can go: 'vdvae gc --yes' removes it" in dry
    assert keys(places) == everything
    space.gc(older_than_hours=24, yes=True)
    assert "freed " in capsys.readouterr().out
    assert keys(places) == everything - only_nobodys
    for manifest in (registered, other, current):
        for split in SPLITS:
            assert sum(len(k) for k, _ in ShardReader(manifest, store, split).scan(500)) > 0

    if kind == "s3":
        return
    # What is in a branch, but in the cache no more, keeps everything of its recipe.
    dvc("gc", "-q", "-f", "--workspace")
    space.gc(older_than_hours=24, yes=True)
    assert re.search(
        "all shards of tiny stay: .* by refs/heads/other, whose", capsys.readouterr().out
    )
    assert keys(places) == everything - only_nobodys
    run("git", "branch", "-q", "-D", "other")
    space.gc(older_than_hours=24, yes=True)
    assert keys(places) == keys_of(registered, current) | {"notes/readme.txt"}
    client = tracking.connect(places.tracking_uri)
    client.delete_model_version("vdvae-tiny", "1")
    space.gc(older_than_hours=24, yes=True)
    assert keys(places) == keys_of(current) | {"notes/readme.txt"}


def test_a_run_elsewhere_on_this_machine_keeps_its_shards(project, monkeypatch, tmp_path):
    register_one(project)
    manifest = shards(project, 1200)
    clone = tmp_path / "clone"
    (clone / MANIFEST).parent.mkdir(parents=True)
    data = load_recipe("tiny").data
    store = open_store(project.store_url)
    write_shards("tiny", data, open_source("tiny", data), store, clone / MANIFEST)
    make_old(project, monkeypatch)
    with subprocess.Popen(["sleep", "100"], cwd=clone) as process:
        space.gc(older_than_hours=24, yes=True)
        assert keys_of(manifest) <= keys(project)
        process.kill()
    space.gc(older_than_hours=24, yes=True)
    assert not keys_of(manifest) <= keys(project)


@pytest.fixture
def refused(project: Places, monkeypatch: pytest.MonkeyPatch) -> Iterator[Places]:
    """A project with old shards that nothing needs, all of which are still there at the end."""
    register_one(project)
    shards(project, 1200)
    make_old(project, monkeypatch)
    before = keys(project)
    yield project
    assert keys(project) == before


def test_without_every_manifest_nothing_is_removed(refused, monkeypatch):
    def refuses(sentence: str) -> None:
        with pytest.raises(UserError, match=sentence):
            space.gc(older_than_hours=24, yes=True)

    MANIFEST.write_text("{")
    refuses(r"^data/manifests/tiny\.json: is damaged .*nothing is removed: mend or remove it$")
    MANIFEST.unlink()
    cached = space.cache_folder() / f"files/md5/00/{'0' * 30}"
    cached.parent.mkdir(parents=True)
    cached.write_text('{\n  "recipe": "tiny"}')
    refuses(r"files/md5/00/0+: is damaged .*nothing is removed")
    cached.unlink()
    with monkeypatch.context() as patched:
        patched.setenv("MLFLOW_TRACKING_URI", "sqlite:////nowhere/mlflow.db")
        refuses(r"/nowhere/mlflow\.db: there is no MLflow database; set MLFLOW_TRACKING_URI")
        patched.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        refuses(r"MLflow at http://127\.0\.0\.1:9 does not answer")
    with monkeypatch.context() as patched:
        patched.chdir("data")
        refuses("run this at the project's root")
    Path("dvc.lock").write_text("stages: [1]")
    commit("broken")
    refuses(r"^dvc\.lock at HEAD: not readable, so nothing is removed")
    run("git", "checkout", "-q", "main")
    run("git", "branch", "-q", "-D", "broken")
    [lineage] = Path("mlruns").rglob("models/*/lineage/tiny.json")
    text = lineage.read_text()
    lineage.write_text(text.replace('"name": "digits"', '"name": "others"'))
    refuses(r"vdvae-tiny version 1: its lineage/tiny\.json cannot be read \(is another")
    lineage.unlink()
    refuses(r"vdvae-tiny version 1: its lineage/.*nothing is removed; restore it, or delete")


def test_training_states_and_what_kills_left(project, capsys):
    register_one(project)
    runs = project.runs

    def state(name: str, days: float, curves: str = "") -> Path:
        folder = runs / name
        (folder / "checkpoints").mkdir(parents=True)
        files = [folder / "checkpoints/step-000000002.safetensors"]
        files[0].write_bytes(bytes(2**20))
        if curves:
            files.append(folder / "curves.csv")
            files[1].write_text(curves)
        for path in (*files, folder / "checkpoints", folder):
            os.utime(path, (time.time() - days * DAY,) * 2)
        return folder

    def temporary(path: str) -> Path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(b"half")
        os.utime(path, (time.time() - 2 * DAY,) * 2)
        return Path(path)

    taken = "step,time\n1,1.0\n"
    Path("curves.csv").write_text(taken)
    dvc("add", "-q", "curves.csv")
    stay = [
        state("tiny-000000000001", days=2),  # to be gone on with
        state("tiny-000000000002", days=2, curves="step\n2\n"),  # DVC has not taken it over
        state("tiny-000000000003", days=0, curves=taken),  # young
        state("tiny-000000000004", days=2, curves=taken),  # locked
        state("somebodys-own-folder", days=99),
        state("shards/tiny-000000000008", days=2),  # a sharding to go on with
        temporary("results/tiny/.not-ours.tmp"),
    ]
    go = [
        state("tiny-000000000005", days=2, curves=taken),
        state("tiny-000000000006", days=31),
        state("shards/tiny-000000000009", days=31),
        state("tiny-000000000007.finished", days=2),
        temporary("results/tiny/model/.model.safetensors.abcd_123.tmp"),
        temporary("data/manifests/.tiny.json.abcdefgh.tmp"),
        temporary("store/shards/tiny/.00.tar.abcdefgh.tmp"),
    ]
    for dead in ("flows/1234", "mlflow/5678"):
        (runs / dead).mkdir(parents=True)
        (runs / f"{dead}.lock").touch()
    with exclusive_lock(runs / "tiny-000000000004.lock"):
        space.du()
        printed = capsys.readouterr().out
        assert "training tiny-000000000004: at work" in printed
        assert re.search(r" 4\.\d MiB  of this is needed by nothing", printed)
        space.gc(older_than_hours=24, yes=False)
        assert all(path.exists() for path in stay + go)
        space.gc(older_than_hours=24, yes=True)
    assert [path for path in stay if not path.exists()] == []
    assert [path for path in go if path.exists()] == []
    assert not list((runs / "flows").iterdir()) and not list((runs / "mlflow").glob("*.lock"))
    assert json.loads(Path("results/tiny/registered.json").read_text())["version"] == 1


def test_what_is_put_again_while_gc_looks_stays(project, monkeypatch):
    shards(project, 1200)
    make_old(project, monkeypatch)
    cache = space.cache_folder()
    entries = space.survey(project, cache, space.find_needs(project, cache), 24)
    [entry] = [entry for entry in entries if entry.remove and "shards of tiny" in entry.what]
    store, [again, *others] = open_store(project.store_url), sorted(keys(project))
    assert others
    store.put(again, store.get(again))  # by somebody whose manifest is to list it
    entry.remove()
    assert keys(project) == {again}


def test_du_tells_who_needs_what(project, monkeypatch, capsys):
    register_one(project)
    shards(project, 1200)
    make_old(project, monkeypatch)
    space.du()
    printed = capsys.readouterr().out
    assert re.search(r"MiB  shards of tiny, \d: needed by a registered version", printed)
    assert re.search(r"MiB  shards of tiny, \d: no manifest lists them", printed)
    assert re.search(r"MiB  DVC's cache /.*\n.*dvc gc --workspace --all-branches", printed)
    assert "database and artifacts" in printed
    space.du(as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["needs_unknown"] is None
    assert {entry["may_go"] for entry in found["entries"]} == {True, False}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    space.du()
    printed = capsys.readouterr().out
    assert "what shards are needed for is not known: MLflow at http://127.0.0.1:9" in printed
    assert re.search(r"shards of tiny, \d: kept", printed)
