"""MLflow is stopped, and then gone, while a stage trains against it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import Project
from mlflow_server import MlflowServer
from test_road import curves

pytestmark = pytest.mark.integration


def test_mlflow_stopped_and_then_gone_while_training_costs_no_point(
    project: Project, tmp_path: Path
) -> None:
    project.set(lambda params: params["recipes"]["digits"]["train"].update(steps=200))
    project.stage("shard", "digits")
    server = MlflowServer(tmp_path / "server")
    server.start()
    try:
        places = {"MLFLOW_TRACKING_URI": server.url, "VDVAE_TRACKING_SECONDS": "0.2"}
        child = project.start(sys.executable, "-m", "pipeline.stages.train", "digits", **places)
        assert child.stdout is not None
        lines = []
        for line in child.stdout:
            lines.append(line)
            step = line.partition("/")[0]
            if step == "step 40":
                server.pause()
            elif step == "step 120":
                server.go_on()
            elif step == "step 140":
                server.kill()
        assert child.wait(timeout=60) == 0, "".join(lines)
        assert "lines and files wait in" in lines[-1], "".join(lines)
        assert len(list(project.folder.glob("runs/mlflow/*/journal.jsonl"))) == 1
        server.start()
        project.stage("evaluate", "digits", **places)
        steps = curves(project, server.url)
        assert steps.pop("train/validation_bits_per_dim") == list(range(10, 201, 10))
        assert len(steps) >= 14
        assert all(each == list(range(5, 201, 5)) for each in steps.values()), steps
        assert pictures(server) == [
            *(f"pictures/contact_{split}.png" for split in ("test", "train", "validation")),
            "pictures/data.png",
            *(f"pictures/training/reconstructions-000000{step}.png" for step in (100, 200)),
            *(f"pictures/training/samples-000000{step}.png" for step in (100, 200)),
        ]
        assert not list(project.folder.glob("runs/mlflow/*"))
    finally:
        server.kill()


def pictures(server: MlflowServer) -> list[str]:
    """Paths of all pictures that the server keeps."""
    (root,) = (server.folder / "artifacts").glob("*/*/artifacts")
    return sorted(str(path.relative_to(root)) for path in root.rglob("*.png"))
