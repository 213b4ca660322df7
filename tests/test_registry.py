"""Registration survives kills and races with one version; only a better model gets the alias."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from registry_project import IMAGES, NAME, Project, enter

import vdvae
from pipeline.params import Places
from pipeline.registry import use as models
from pipeline.registry.aliases import Move
from pipeline.registry.register import promote, rollback
from vdvae import UserError
from vdvae.evaluate import score
from vdvae.files import sha256_of

pytestmark = pytest.mark.integration


@pytest.fixture
def project(tmp_path, monkeypatch, empty_store) -> Project:
    """A project whose training and evaluation are done, with a store of its own."""
    enter(tmp_path, monkeypatch, empty_store)
    project = Project()
    project.finish_training(weights=0, bits=2.0)
    return project


def test_the_registered_model_scores_and_samples_without_the_repository(project, tmp_path):
    registered = project.register()
    uri = project.places.tracking_uri
    rng = np.random.default_rng(0)
    images_NHWC = vdvae.levels.levels_to_uint8(rng.integers(0, 17, (5, 8, 8, 1)), 17)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    np.save(elsewhere / "images.npy", images_NHWC)
    code = f"""if True:
        import mlflow, numpy, sys
        model = mlflow.pyfunc.load_model("models:/{NAME}@champion")
        images = numpy.load("images.npy")
        numpy.save("bits.npy", model.predict(images)["bits_per_dim"])
        assert list(model.predict(images[:0])["bits_per_dim"]) == []
        draw = {{"mode": "sample", "n": 16, "temperature": 0.85, "seed": 7}}
        first, again = (model.predict(images[:0], params=draw) for _ in range(2))
        assert (first == again).all()
        assert (first != model.predict(images[:0], params=draw | {{"seed": 8}})).any()
        numpy.save("samples.npy", first)
        for params in ({{"mode": "draw"}}, draw | {{"n": 0}}, draw | {{"temperature": -1.0}}):
            try:
                model.predict(images[:0], params=params)
            except ValueError as error:
                print(error)
        assert "pipeline" not in sys.modules
        print(sys.modules["vdvae"].__file__)
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=elsewhere,
        env={**environment, "MLFLOW_TRACKING_URI": uri},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    *errors, package = done.stdout.splitlines()
    assert [error.partition(":")[0] for error in errors] == ["mode", "n", "temperature"]
    assert Path(package).is_relative_to(project.places.runs.parent / "mlruns" / "artifacts")

    model = vdvae.load(project.results / "model")
    x_BCHW = torch.from_numpy(images_NHWC.transpose(0, 3, 1, 2).copy())
    expected = score(model, x_BCHW, seed=5).bits_per_dim_B
    np.testing.assert_allclose(np.load(elsewhere / "bits.npy"), expected, rtol=1e-6)
    samples = np.load(elsewhere / "samples.npy")
    assert samples.shape == (16, 8, 8, 1) and samples.dtype == np.uint8
    ours = models.sample(f"{NAME}@champion", n=16, temperature=0.85, seed=7)
    np.testing.assert_array_equal(samples, ours)

    version = project.client.get_model_version(NAME, str(registered.version))
    weights = sha256_of(project.results / "model/model.safetensors")
    assert version.tags["weights_sha256"] == registered.weights_sha256 == weights
    assert float(version.tags["validation_bits_per_dim"]) == pytest.approx(2.0)
    assert version.tags["dvc_lock_sha256"] == sha256_of(Path("dvc.lock"))
    assert json.loads((project.results / "registered.json").read_text()) == {
        "name": NAME,
        "version": 1,
        "alias": "champion",
        "mlflow_run_id": version.run_id,
        "weights_sha256": weights,
    }


def test_registering_again_changes_nothing(project):
    first = project.register()
    assert project.register() == first
    assert project.versions() == [1]
    run = project.client.get_run(first.mlflow_run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["validation/bits_per_dim"] == pytest.approx(2.0)
    history = project.client.get_metric_history(first.mlflow_run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 3.5), (2, 3.25)]


def test_only_a_clearly_better_model_on_the_same_data_gets_the_alias(project, monkeypatch):
    monkeypatch.setenv("LOGNAME", "somebody")
    project.register()
    for weights, bits in ((1, 2.0), (2, 2.1), (3, 1.995)):  # equal, worse, better by luck
        project.finish_training(weights, bits)
        stays = project.register()
        assert (stays.alias, project.champion()) == (None, 1)
        assert "champion stays version 1: the difference is not above zero: " in stays.decision
    project.finish_training(weights=4, bits=1.9)
    better = project.register()
    assert (better.version, better.alias, project.champion()) == (5, "champion", 5)
    assert better.decision.startswith(f"champion: 1 -> 5, better by +0.1000 bits/dim over {IMAGES}")
    first, move = project.moves()
    assert (first.source, first.target, first.why) == (None, "1", "first")
    assert (move.source, move.target, move.why) == ("1", "5", "better")
    assert move.who.startswith("somebody@") and move.when.startswith("20")
    low, high = move.comparison.interval
    assert move.comparison.difference == pytest.approx(0.1)
    assert 0 < low < 0.1 < high
    assert (move.comparison.confidence, move.comparison.images) == (0.95, IMAGES)

    # Other data are not compared; the sentence says what a person can do, and that works.
    project.finish_training(weights=5, bits=0.5, data=1)
    other = project.register()
    assert (other.alias, project.champion()) == (None, 5)
    assert "version 6 cannot be compared with it: other data (manifest_digest: " in other.decision
    assert f"run 'vdvae models promote {NAME}/6'" in other.decision
    promote(f"{NAME}/6", "champion", project.places)
    assert project.champion() == 6
    with pytest.raises(UserError, match="version 6: has the alias 'champion' already"):
        promote(f"{NAME}/6", "champion", project.places)

    # Each version has its turn once: what a person does with the alias afterwards stays.
    project.client.set_registered_model_alias(NAME, "champion", "1")
    project.finish_training(weights=4, bits=1.9)
    again = project.register()
    assert (again.alias, again.decision) == (None, "champion stays version 1")
    assert project.champion() == 1
    assert project.journey()[2:] == [
        ("5", "6", "chosen by hand"),
        ("6", "1", "found moved"),
    ]


def test_figures_of_the_holder_that_are_not_its_own_decide_nothing(project):
    project.register()
    (path,) = Path("mlruns").rglob("evaluation/conditions.json")
    conditions = json.loads(path.read_text())
    path.write_text(json.dumps({**conditions, "weights_sha256": "0" * 64}))
    project.finish_training(weights=1, bits=1.0)
    refused = project.register()
    assert project.champion() == 1
    assert "version 1 are of another weights_sha256; to choose it" in refused.decision


def test_rollback_goes_back_step_by_step_on_the_record(project):
    project.register()
    for weights, bits in ((1, 1.9), (2, 1.8)):
        project.finish_training(weights, bits)
        project.register()
    assert project.champion() == 3
    for version in (2, 1):
        move = rollback(NAME, project.places)
        assert (move.target, move.why, project.champion()) == (str(version), "rollback", version)
    with pytest.raises(UserError, match=r"vdvae-tiny@champion: no earlier version .* \(it is at 1"):
        rollback(f"{NAME}@champion", project.places)
    with pytest.raises(UserError, match="no version of vdvae-tiny has the alias 'best'"):
        rollback(f"{NAME}@best", project.places)
    # What was rolled back has had its turn; a new one is measured against the holder.
    project.register()
    assert project.champion() == 1
    project.finish_training(weights=3, bits=1.85)
    assert project.register().alias == "champion"
    project.client.delete_model_version(NAME, "1")
    with pytest.raises(UserError, match="no earlier version"):
        rollback(NAME, project.places)
    assert [why for _, _, why in project.journey()][-3:] == ["rollback", "rollback", "better"]


@pytest.mark.parametrize("earlier", [0, 1])
@pytest.mark.parametrize(
    "call, after",
    [
        ("log_artifacts", True),
        ("create_model_version", False),  # the registered model is there, without a version
        ("create_model_version", True),
        ("set_registered_model_alias", False),  # the move is written down, not made
        ("set_registered_model_alias", True),
    ],
)
def test_a_killed_registration_is_finished_by_the_next(project, monkeypatch, call, after, earlier):
    if earlier:
        project.register()
        (project.results / "registered.json").unlink()
        project.finish_training(weights=1, bits=1.9)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        killed_at(patched, call, after)
        project.register()
    assert not (project.results / "registered.json").exists()

    registered = project.register()
    assert project.versions() == [1, 2][: earlier + 1]
    assert registered.version == project.champion() == earlier + 1
    assert (project.results / "registered.json").exists()
    moves = [("1", "2", "better")] if earlier else [(None, "1", "first")]
    assert project.journey()[earlier:] == moves


def killed_at(patched, call, after):
    """Lets a call of MLflow be the last thing that the process does, before or after its effect."""
    from mlflow import MlflowClient

    original = getattr(MlflowClient, call)

    def killed(*arguments, **options):
        if after:
            original(*arguments, **options)
        raise KeyboardInterrupt

    patched.setattr(MlflowClient, call, killed)


@pytest.mark.parametrize("after", [False, True])
def test_a_killed_rollback_leaves_no_lie(project, monkeypatch, after):
    project.register()
    project.finish_training(weights=1, bits=1.9)
    project.register()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        killed_at(patched, "set_registered_model_alias", after)
        rollback(NAME, project.places)
    made = ("2", "1", "rollback")
    assert project.journey()[2:] == [made] * after
    if after:
        with pytest.raises(UserError, match="no earlier version"):
            rollback(NAME, project.places)
    else:
        rollback(NAME, project.places)
    assert project.champion() == 1
    assert project.journey()[2:] == [made]


def test_moves_that_earlier_versions_recorded_in_two_phases_are_read(project):
    def record(number, source, target, why, state):
        move = Move(alias="champion", source=source, target=target, why=why)
        text = json.dumps({**json.loads(move.to_json()), "state": state})
        project.client.set_registered_model_tag(NAME, f"move.{number:06d}.abcd", text)

    project.register()
    record(2, "1", "2", "better", "abandoned")
    record(3, "1", "2", "better", "done")
    record(4, "2", "1", "rollback", "intended")  # killed after it was made
    journey = [(None, "1", "first"), ("1", "2", "better"), ("2", "1", "rollback")]
    assert project.journey() == journey
    # Killed before it was made; then somebody chose another version in MLflow's page.
    record(5, "1", "7", "better", "intended")
    project.finish_training(weights=1, bits=2.1)
    project.register()
    project.client.set_registered_model_alias(NAME, "champion", "2")
    assert project.journey() == [*journey, ("1", "2", "found moved")]
    # What was confirmed stays, although it was moved back by hand.
    record(6, "2", "1", "chosen by hand", "done")
    assert project.journey()[4:] == [("2", "1", "chosen by hand"), ("1", "2", "found moved")]


def test_another_machine_that_moves_the_alias_meanwhile_is_noticed(project, monkeypatch):
    from mlflow import MlflowClient

    for weights, bits in ((0, 2.0), (1, 1.8), (2, 1.9)):
        project.finish_training(weights, bits)
        if weights < 2:
            project.register()
    project.client.set_registered_model_alias(NAME, "champion", "1")
    original = MlflowClient.get_model_version
    reads = []

    def meanwhile(client, *arguments, **options):
        reads.append(arguments)
        if len(reads) == 1:  # the holder is being looked up for the comparison
            client.set_registered_model_alias(NAME, "champion", "2")
        return original(client, *arguments, **options)

    monkeypatch.setattr(MlflowClient, "get_model_version", meanwhile)
    third = project.register()
    assert "champion stays version 2: " in third.decision
    assert project.champion() == 2


def test_processes_registering_at_once_make_each_model_one_version(project, tmp_path):
    """In a new store, five processes with four models, one of them clearly the best."""
    shutil.rmtree("mlruns")
    root = str(Path(__file__).parent.parent)
    settings = {
        "PYTHONPATH": root,
        "OMP_NUM_THREADS": "1",
        "MLFLOW_TRACKING_URI": project.places.tracking_uri,
        "VDVAE_RUNS": str(project.places.runs),
    }
    bits = [2.0, 1.5, 2.0, 1.9, 1.5]
    folders = []
    for number, value in enumerate(bits):
        project.finish_training(weights=number % 4 if number < 4 else 1, bits=value)
        folders.append(tmp_path / str(number))
        folders[-1].mkdir()
        for name in ("params.yaml", "dvc.lock"):
            shutil.copy(name, folders[-1])
        for name in ("data", "results"):
            shutil.copytree(name, folders[-1] / name)

    def register(folder: Path) -> tuple[int, str]:
        words = ("-m", "pipeline.stages.register", "tiny")
        environment = os.environ | settings
        return warm.run(Path(os.environ["WARM_PYTHON"]), words, folder, environment, 280)

    with ThreadPoolExecutor(5) as threads:
        ended = list(threads.map(register, folders))
    for code, said in ended:  # one line: MLflow does not chatter
        assert (code, said.count("\n")) == (0, 1), said
        assert said.startswith("registered vdvae-tiny version ")
    records = [
        json.loads((folder / "results/tiny/registered.json").read_text()) for folder in folders
    ]
    numbers = [record["version"] for record in records]
    assert sorted(numbers[:4]) == project.versions() == [1, 2, 3, 4]
    assert project.champion() == numbers[1] == numbers[4]
    first, *_ = journey = project.journey()
    assert (first[0], journey[-1][1]) == (None, str(numbers[1]))
    assert {why for _, _, why in journey} <= {"first", "better"}


def test_a_wiped_store_gets_run_and_model_again(project, empty_store):
    first = project.register()
    project.finish_training(weights=1, bits=1.9)
    project.register()
    shutil.copy(empty_store, "mlruns/new.db")
    project.places = Places(
        store_url=project.places.store_url,
        runs=project.places.runs,
        tracking_uri=f"sqlite:///{Path('mlruns/new.db').absolute()}",
    )
    again = project.register()
    assert (again.version, again.alias) == (1, "champion")
    files = {file.path for file in project.client.list_artifacts(again.mlflow_run_id)}
    assert {"per_image.csv", "conditions.json", "metrics.json"} <= files
    assert again.mlflow_run_id != first.mlflow_run_id
    run = project.client.get_run(again.mlflow_run_id)
    assert run.data.params["train.steps"] == "2"
    assert len(project.client.get_metric_history(run.info.run_id, "train/loss")) == 2


def test_missing_or_damaged_results_are_named(project):
    weights = project.results / "model/model.safetensors"
    good = weights.read_bytes()

    def refused(*patterns):
        for pattern in patterns:
            with pytest.raises(UserError, match=pattern):
                project.register()

    weights.write_bytes(good[:100])
    refused(r"model\.safetensors")
    torch.manual_seed(1)
    vdvae.save(vdvae.VDVAE(project.recipe.model), project.results / "model")
    refused(r"conditions\.json: weights_sha256: the figures are of .* -s evaluate@tiny")
    weights.write_bytes(good)
    manifest = project.places.manifest("tiny")
    manifest.write_text(manifest.read_text().replace('"num_levels": 17', '"num_levels": 32'))
    refused(r"8, 1, 17\), while data/manifests.* has \(8, 8, 1, 32\)")
    figures = project.results / "per_image.csv"
    project.finish_training(weights=0, bits=2.0)
    figures.write_text(figures.read_text().replace("validation,image-0,", "test,image-99,"))
    refused(r"per_image\.csv: the mean over 11 validation images is .* -s evaluate@tiny")
    project.finish_training(weights=0, bits=float("nan"))
    refused(r"bits_per_dim: nan .* -s evaluate@tiny")
    (project.results / "metrics.json").unlink()
    refused(r"metrics\.json: not found; run 'dvc repro")
    assert not (project.results / "registered.json").exists()
