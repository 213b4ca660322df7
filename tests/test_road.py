"""Whole roads through DVC, the store and MLflow, undisturbed and killed."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Project, narrow
from PIL import Image
from s3_server import S3Server

from pipeline import storage
from pipeline.flows.overrides import Overrides, apply
from pipeline.system.exits import UNAVAILABLE

pytestmark = pytest.mark.integration

USE_THE_MODEL = """
import sys, json, numpy as np, mlflow
images = np.load(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/vdvae-digits@champion")
import vdvae  # the version's own, which it carries
table = model.predict(images)
ask = {"mode": "sample", "n": 4, "temperature": 0.85, "seed": 7}
grid = model.predict(images[:0], params=ask)
again = model.predict(images[:0], params=ask)
print(json.dumps({"bits": list(table["bits_per_dim"]), "shape": grid.shape,
                  "dtype": str(grid.dtype), "equal": bool((grid == again).all()),
                  "vdvae": vdvae.__file__}))
"""


def read(project: Project, name: str) -> Any:
    return json.loads((project.folder / "results/digits" / name).read_text())


def weights_sha256(project: Project) -> str:
    path = project.folder / "results/digits/model/model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def store_uri(project: Project) -> str:
    return f"sqlite:///{project.folder}/mlruns/mlflow.db"


def mlflow_runs(project: Project, uri: str = "") -> list[Any]:
    """All runs of the project's store, or of another one."""
    from mlflow import MlflowClient

    client = MlflowClient(uri or store_uri(project))
    experiment = client.get_experiment_by_name("vdvae")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def curves(project: Project, uri: str = "") -> dict[str, list[int]]:
    """Steps of every curve in MLflow, over all runs of the store."""
    from mlflow import MlflowClient

    client = MlflowClient(uri or store_uri(project))
    (run,) = mlflow_runs(project, uri)
    assert run.info.status == "FINISHED"
    return {
        key: [point.step for point in client.get_metric_history(run.info.run_id, key)]
        for key in run.data.metrics
        if key.startswith(("train/", "system/"))
    }


def images_with_figures(project: Project, count: int) -> tuple[np.ndarray, list[float]]:
    from sklearn.datasets import load_digits

    rows = [
        row
        for row in csv.DictReader((project.folder / "results/digits/per_image.csv").open())
        if row["split"] == "test"
    ][:count]
    levels = load_digits().images[[int(row["key"].rsplit("-", 1)[1]) for row in rows]]
    x_NHWC = np.floor(255 * levels / 16 + 0.5).astype(np.uint8)[..., None]
    return x_NHWC, [float(row["bits_per_dim"]) for row in rows]


def test_two_commands_to_a_registered_model(project: Project, tmp_path: Path) -> None:
    project.repro(cold=True)
    metrics, registered = read(project, "metrics.json"), read(project, "registered.json")
    assert {split: figures["images"] for split, figures in metrics.items()} == {
        "validation": 180,
        "test": 360,
    }
    for figures in metrics.values():
        parts = figures["rate_bits_per_dim"] + figures["distortion_bits_per_dim"]
        assert figures["bits_per_dim"] == pytest.approx(parts)
        assert 0 < figures["bits_per_dim_se"] < 0.1
        assert figures["bits_per_dim"] < 4.09  # uniform
    assert registered["name"] == "vdvae-digits"
    assert (registered["version"], registered["alias"]) == (1, "champion")
    assert registered["weights_sha256"] == weights_sha256(project)
    assert read(project, "conditions.json")["weights_sha256"] == weights_sha256(project)
    for picture, count in (("samples.png", 4), ("reconstructions.png", 2 * 4)):
        with Image.open(project.folder / "results/digits" / picture) as image:
            assert image.width * image.height >= count * 48 * 48
    assert all(
        steps == [5, 10, 15, 20, 25, 30]
        for key, steps in curves(project).items()
        if key != "train/validation_bits_per_dim"
    )

    # The second time nothing runs.
    output = project.repro()
    assert output.count("didn't change, skipping") == 5
    assert "Running stage" not in output

    # The table at the end of `make demo`.
    shown = project.run(
        sys.executable, "-c", "from pipeline.cli.main import main; main()", "show", "digits"
    )
    assert (
        f"{metrics['test']['bits_per_dim']:.4f} ± {metrics['test']['bits_per_dim_se']:.4f}" in shown
    )
    assert registered["mlflow_run_id"] in shown

    # The version leads back to these very bytes.
    words = (sys.executable, "-c", "from pipeline.cli.main import main; main()", "models", "show")
    verified = project.run(*words, "vdvae-digits", "--verify")
    assert "dvc.lock    " in verified
    assert "shard@digits, train@digits, evaluate@digits, sample@digits" in verified
    assert verified.endswith("4 entries of dvc.lock: no differences\n")

    # Found by name and alias, in another folder, with the vdvae that the version carries.
    images, figures = images_with_figures(project, 5)
    np.save(tmp_path / "images.npy", images)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", USE_THE_MODEL, str(tmp_path / "images.npy")],
        cwd=elsewhere,
        env={
            **project.environment,
            "MLFLOW_TRACKING_URI": f"sqlite:///{project.folder}/mlruns/mlflow.db",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    answer = json.loads(done.stdout.splitlines()[-1])
    np.testing.assert_allclose(answer["bits"], figures, rtol=1e-6)
    assert answer["shape"] == [4, 8, 8, 1]
    assert (answer["dtype"], answer["equal"]) == ("uint8", True)
    assert Path(answer["vdvae"]).is_relative_to(project.folder / "mlruns")

    # -f trains afresh under a new MLflow run; the same weights are the same version.
    key = read(project, "run.json")["run_key"]
    assert "step 30/30" in project.repro("-f", "-s", "train@digits")
    assert read(project, "run.json")["run_key"] != key
    assert weights_sha256(project) == registered["weights_sha256"]
    project.repro("-f", "-s", "register@digits")
    assert read(project, "registered.json")["version"] == 1

    # More steps go on from what DVC has recorded, and a kill on the way loses none of them.
    project.set(lambda params: params["recipes"]["digits"]["train"].update(steps=400))
    child = project.start(sys.executable, "-m", "pipeline.stages.train", "digits")
    for line in child.stdout or ():
        if line.startswith("step 35/400"):
            break
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    assert not list(project.folder.glob("runs/*/curves.csv"))  # it would count as finished
    output = project.repro("-s", "train@digits")
    assert re.search(r"resuming at step \d+0/400", output)
    assert "step 400/400" in output


def test_figures_do_not_depend_on_ranks_and_batches(project: Project) -> None:
    """1 rank and 2, batches of 7 and 64: the same images, each once, to 1e-6 relative."""

    def figures(batch_size: int, *launcher: str) -> dict[str, list[float]]:
        project.set(
            lambda params: params["recipes"]["digits"]["evaluate"].update(
                batch_size=batch_size, passes=2, iwae=2
            )
        )
        words = launcher or (sys.executable,)
        said = project.run(*words, "-m", "pipeline.stages.evaluate", "digits")
        assert said.count("images, 2 draws of the posterior") == 2
        with (project.folder / "results/digits/per_image.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        manifest = json.loads((project.folder / "data/manifests/digits.json").read_text())
        assert Counter(row["split"] for row in rows) == {
            split: manifest["splits"][split]["images"] for split in ("validation", "test")
        }
        names = ("bits_per_dim", "rate_nats", "distortion_nats", "iwae_nats")
        return {f"{row['split']}/{row['key']}": [float(row[n]) for n in names] for row in rows}

    project.repro("train@digits")
    two = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    alone = figures(64)
    summary = read(project, "metrics.json")
    for other in (figures(7, *two), figures(7)):
        assert list(other) == list(alone)  # in the manifest's order
        # A rate of thousandths of a nat is a sum over many that cancel: it has an absolute error.
        np.testing.assert_allclose(list(other.values()), list(alone.values()), rtol=1e-6, atol=1e-6)
    for split, found in read(project, "metrics.json").items():
        assert found == pytest.approx(summary[split], rel=1e-6, abs=1e-8)
        assert found["iwae_bits_per_dim"] < found["bits_per_dim"] + found["bits_per_dim_se_draws"]
    rates = read(project, "rates.json")["test"]
    by_layer = [layer["rate_bits_per_dim"] for layer in rates["rate_bits_per_dim_by_layer"]]
    by_resolution = rates["rate_bits_per_dim_by_resolution"]
    assert list(by_resolution) == ["1", "4", "8"]
    for figure in (sum(by_layer), sum(by_resolution.values())):
        assert figure == pytest.approx(found["rate_bits_per_dim"], rel=1e-9)

    words = (
        sys.executable,
        "-c",
        "from pipeline.cli.main import main; main()",
        "evaluate",
        "digits",
    )
    said = project.run(*words, "--precision", "fp32,bf16")
    assert [line.partition(":")[0] for line in said.splitlines()] == ["fp32", "bf16"]
    audit = read(project, "precision.json")["precisions"]
    assert audit["fp32"]["bits_per_dim"] == found["bits_per_dim"]
    assert 0 < abs(audit["bf16"]["shift_bits_per_dim"]) < 0.05
    assert "tf32 needs a CUDA device" in project.run(*words, "--precision", "tf32", code=2)


def test_killed_in_every_stage_the_same_command_gives_the_same_result(tmp_path: Path) -> None:
    """kill -9 of everything in each stage, then `dvc repro` again: all is equal.

    tests/campaign/test_road_kills.py kills at random moments.
    """
    moments = ("'shard@", "step 25/", "'evaluate@", "'sample@", "'register@")
    hold_a_killed_road(tmp_path, [partial(kill_at, moment) for moment in moments])


def kill_at(word: str, child: subprocess.Popen[str]) -> None:
    """Kills a process group when it has printed a word."""
    assert child.stdout is not None
    for line in child.stdout:
        if word in line:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
            return
    pytest.fail(f"it ended before it printed {word}")


def hold_a_killed_road(
    folder: Path, killers: Sequence[Callable[[subprocess.Popen[str]], None]]
) -> None:
    """Two equal roads, of which one is killed time and again, and all that must then be equal."""
    projects = []
    for name in ("undisturbed", "killed"):
        projects.append(Project(folder / name))
        projects[-1].set(narrow)
    undisturbed, killed = projects
    undisturbed.repro()
    for kill in killers:
        kill(killed.start(sys.executable, "-m", "dvc", "repro"))
    killed.repro()
    assert weights_sha256(killed) == weights_sha256(undisturbed)
    assert read(killed, "metrics.json") == read(undisturbed, "metrics.json")
    assert curves(killed) == curves(undisturbed)
    for file in ("per_image.csv", "samples.png", "reconstructions.png"):
        ours, theirs = (p.folder / "results/digits" / file for p in projects)
        assert ours.read_bytes() == theirs.read_bytes()
    assert read(killed, "registered.json")["version"] == 1
    assert killed.repro().count("didn't change, skipping") == 5


def test_a_killed_dvc_leaves_no_trainer_and_the_next_start_goes_on(project: Project) -> None:
    project.set(lambda params: params["recipes"]["digits"]["train"].update(steps=100_000))
    child = project.start(sys.executable, "-m", "dvc", "repro")
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("step 40/"):
            break
    os.kill(child.pid, signal.SIGKILL)  # DVC alone; the stage is told by the system
    rest = child.stdout.read()  # ends when the last holder of the pipe is gone
    assert "stopped after a checkpoint" in rest
    child.wait()
    project.set(lambda params: params["recipes"]["digits"]["train"].update(steps=60))
    steps = [int(path.stem[5:]) for path in project.folder.glob("runs/*/checkpoints/*.json")]
    assert max(steps) >= 40
    project.set(lambda params: params["recipes"]["digits"]["train"].update(steps=max(steps) + 10))
    assert f"resuming at step {max(steps)}/" in project.repro()


@pytest.mark.parametrize(
    ("spoil", "stage", "words"),
    [
        (lambda p: p["recipes"]["cifar10"]["data"].update(path="data/raw/none.tar.gz"), "shard",
         "c32a1d4ab5d03f1284b67883e8d87530"),
        (lambda p: p["recipes"]["cifar10"]["train"].update(device="cuda"), "train",
         "train.device: 'cuda' is asked for but this machine offers no CUDA device"),
        (lambda p: None, "train", "data/manifests/cifar10.json"),
        (lambda p: None, "evaluate", "data/manifests/cifar10.json"),
        (lambda p: None, "register", "data/manifests/cifar10.json"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named_in_one_line(
    project: Project, spoil: Any, stage: str, words: str
) -> None:
    project.set(spoil)
    output = project.stage(stage, "cifar10", code=2)
    assert words in output
    assert output.count("\n") == 1
    assert not (project.folder / "results/cifar10").exists()
    assert not (project.folder / "data/manifests/cifar10.json").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1400 KiB: less than the shards of the digits."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1400k", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system (not root)")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named_and_nothing_is_half_written(
    project: Project, small_disk: Path
) -> None:
    output = project.stage("shard", "digits", code=2, VDVAE_STORE=f"file://{small_disk}/store")
    assert "No space left on device" in output
    assert output.splitlines()[-1].startswith("error: store file://")
    assert "Traceback" not in output
    assert not (project.folder / "data").exists()
    # Shards are whole or not there, and without a manifest nothing names them.
    for path in small_disk.rglob("*"):
        assert path.is_dir() or hashlib.sha256(path.read_bytes()).hexdigest() == path.stem
    shutil.rmtree(small_disk / "store")

    project.stage("shard", "digits")
    fill = small_disk / "fill"
    fill.write_bytes(bytes(1360 * 1024))
    output = project.stage("train", "digits", code=2, VDVAE_RUNS=str(small_disk / "runs"))
    assert "are free, but 3 checkpoints need" in output.splitlines()[-1]  # before it begins
    assert "Traceback" not in output
    assert not [path for path in small_disk.rglob("*") if path.suffix in (".safetensors", ".tmp")]
    assert not (project.folder / "results/digits/model").exists()
    fill.unlink()
    project.stage("train", "digits", VDVAE_RUNS=str(small_disk / "runs"))


def test_a_forms_images_in_s3_become_shards_in_s3(
    project: Project, s3_url: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = s3_url.removeprefix("s3://bucket/")
    client = storage._s3_client(os.getpid())
    for seed in range(12):
        pixels = np.random.RandomState(seed).randint(0, 256, (40, 30, 3)).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        client.put_object(Bucket="bucket", Key=f"{prefix}/{seed}.png", Body=file.getvalue())
    monkeypatch.setenv("VDVAE_DATA_ROOTS", "s3://bucket")
    apply(Overrides(data=s3_url), "folder", project.folder / "params.yaml")
    before = {path for path in project.folder.rglob("*") if "__pycache__" not in str(path)}
    places = s3.environment() | {"VDVAE_STORE": f"{s3_url}-store"}
    output = project.stage("shard", "folder", **places)
    assert output.startswith("converted: {'enlarged': 12}\ntrain ")
    manifest = json.loads((project.folder / "data/manifests/folder.json").read_text())
    assert sum(split["images"] for split in manifest["splits"].values()) == 12
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            data = storage.open_store(f"{s3_url}-store").get(shard["key"])
            assert hashlib.sha256(data).hexdigest() == shard["sha256"]
    after = {path for path in project.folder.rglob("*") if "__pycache__" not in str(path)}
    new = {str(path.relative_to(project.folder)) for path in after - before if path.is_file()}
    # No raw image was written to disk: decoded shards and contact sheets alone.
    beside = ("cache/", "runs/shards/", "results/folder/contact_")
    assert {path for path in new if not path.startswith(beside)} == {"data/manifests/folder.json"}

    # A secret of the environment is in no sentence.
    places["AWS_SECRET_ACCESS_KEY"] = "another-secret"
    output = project.stage("shard", "folder", code=2, **places)
    assert output.startswith(f"error: {s3_url}: cannot be listed: SignatureDoesNotMatch")
    assert output.count("\n") == 1 and "another-secret" not in output


def test_a_clean_clone_with_what_dvc_pushed_has_nothing_to_do(
    project: Project, s3_url: str, s3: S3Server, tmp_path: Path
) -> None:
    dvc = (sys.executable, "-m", "dvc")
    places = s3.environment() | {"VDVAE_STORE": f"{s3_url}/store"}
    project.set(lambda params: params["recipes"]["digits"]["train"].update(steps=5))
    project.run(*dvc, "remote", "add", "-d", "bucket", f"{s3_url}/dvc")
    project.run(*dvc, "repro", **places)
    project.run("git", "add", "-A")
    project.run("git", "commit", "-qm", "digits")
    project.run(*dvc, "push", "-q", **places)
    project.run("git", "clone", "-q", str(project.folder), str(tmp_path / "clone"))
    project.folder = tmp_path / "clone"
    project.run(*dvc, "pull", "-q", **places)
    assert "Data and pipelines are up to date." in project.run(*dvc, "repro", **places)
    # And what is not up to date finds its shards and its model.
    project.run(*dvc, "repro", "-f", "-s", "sample@digits", **places)


def test_places_that_cannot_be_written_are_named(project: Project) -> None:
    nowhere = "/proc/nowhere"
    output = project.stage("shard", "digits", code=2, VDVAE_STORE=f"file://{nowhere}")
    assert f"error: store file://{nowhere}: cannot write" in output
    project.stage("shard", "digits")
    output = project.stage("train", "digits", code=2, VDVAE_RUNS=nowhere)
    assert output.startswith(f"error: {nowhere}: cannot be made")
    assert "set VDVAE_RUNS to another folder" in output


def test_mlflow_that_does_not_answer_is_named(project: Project) -> None:
    project.stage("shard", "digits")
    uri = "http://127.0.0.1:9"  # the discard port: nobody listens
    output = project.stage("train", "digits", code=UNAVAILABLE, MLFLOW_TRACKING_URI=uri)
    assert output.startswith(f"error: MLflow at {uri} does not answer")
    assert not (project.folder / "results/digits/model").exists()


def test_a_manifest_of_other_images_is_refused_and_its_remedy_works(project: Project) -> None:
    project.repro("shard@digits")
    path = project.folder / "data/manifests/digits.json"
    manifest = json.loads(path.read_text())
    shard = next((project.folder / "store").rglob("*.tar"))
    whole = shard.read_bytes()
    shard.chmod(0o644)
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    shutil.rmtree(project.folder / "cache", ignore_errors=True)  # what was read was verified
    output = project.stage("train", "digits", code=2)
    assert "sha256 mismatch" in output
    remedy = "dvc repro -f -s shard@digits"
    assert remedy in output
    project.run(sys.executable, "-m", *remedy.split())
    project.stage("train", "digits")
    assert json.loads(path.read_text()) == manifest

    project.set(lambda params: params["recipes"]["digits"]["data"].update(num_levels=16))
    output = project.stage("train", "digits", code=2)
    assert "num_levels is 17, params.yaml says 16; run 'dvc repro shard@digits'" in output
