"""A small project at the point where its model can be registered, and looks into the registry."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vdvae
from pipeline import tracking
from pipeline.params import Places, load_recipe
from pipeline.registry import register as registry
from pipeline.registry.aliases import Move, history
from pipeline.registry.register import register
from pipeline.shards import Manifest
from vdvae.files import sha256_of

PARAMS = """
active: [tiny]
active_studies: []
recipes:
  tiny:
    data: {source: folder, path: images, image_size: 8, channels: 1, num_levels: 17}
    model: {encoder: "8x1,8d4,2x1", decoder: "2x1,8m2", width: 8, latent_channels: 2, mixtures: 2}
    train: {steps: 2, batch_size: 2, learning_rate: 0.001}
"""
NAME = "vdvae-tiny"
IMAGES = 12


def enter(folder: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> None:
    """Makes the folder a project with a store of its own, and stands in it."""
    monkeypatch.chdir(folder)
    for setting in ("VDVAE_STORE", "VDVAE_RUNS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(setting, raising=False)
    Path("params.yaml").write_text(PARAMS)
    Path("dvc.lock").write_text("stages: {}\n")
    Path("mlruns").mkdir()
    shutil.copy(empty_store, "mlruns/mlflow.db")


class Project:
    """The results of the stages before `register`, in the current folder."""

    results = Path("results/tiny")

    def __init__(self) -> None:
        self.places = Places.from_env()
        self.recipe = load_recipe("tiny")

    def finish_training(self, weights: int, bits: float, data: int = 0) -> None:
        """Writes what `shard`, `train` and `evaluate` leave; `bits` is the mean bits/dim."""
        self.write_manifest(data)
        self.write_results(weights, bits)

    def write_manifest(self, data: int = 0) -> None:
        """Writes a manifest of shards that are nowhere."""
        manifest = {
            "recipe": "tiny",
            "shape": [8, 8, 1],
            "num_levels": 17,
            "mean": 100.0 + data,
            "std": 50.0,
            "source": {"name": "folder", "terms": "own", "fingerprint": "0" * 64, "notes": {}},
            "splits": {
                split: {
                    "images": IMAGES,
                    "shards": [
                        {
                            "name": f"tiny-{split}-000000.tar",
                            "key": f"shards/tiny/{'0' * 64}.tar",
                            "bytes": 20480,
                            "sha256": "0" * 64,
                            "images": IMAGES,
                        }
                    ],
                }
                for split in ("train", "validation", "test")
            },
        }
        path = self.places.manifest("tiny")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(manifest))

    def write_results(self, weights: int, bits: float) -> None:
        """Writes what `train` and `evaluate` leave of the manifest that is there."""
        torch.manual_seed(weights)
        vdvae.save(vdvae.VDVAE(self.recipe.model), self.results / "model")
        (self.results / "curves.csv").write_text("step,time,loss\n1,100.0,3.5\n2,101.0,3.25\n")
        hard_and_easy = np.linspace(-1, 1, IMAGES)
        noise = np.random.default_rng(weights).normal(0, 0.02, IMAGES)
        values = bits + hard_and_easy + noise - noise.mean()
        with (self.results / "per_image.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["split", "key", "bits_per_dim", "rate_nats", "distortion_nats"])
            for split in ("validation", "test"):
                for index, value in enumerate(values.tolist()):
                    table.writerow([split, f"image-{index}", value, 1.0, 2.0])
        figures = {
            "bits_per_dim": values.mean(),
            "bits_per_dim_se": values.std(ddof=1) / IMAGES**0.5,
            "rate_bits_per_dim": 0.5,
            "distortion_bits_per_dim": values.mean() - 0.5,
            "nats_per_dim": values.mean() * np.log(2),
            "images": IMAGES,
        }
        (self.results / "metrics.json").write_text(
            json.dumps({"validation": figures, "test": figures})
        )
        conditions = {
            "weights_sha256": sha256_of(self.results / "model/model.safetensors"),
            "manifest_digest": Manifest.load(self.places.manifest("tiny")).digest,
            "seed": 5,
            "posterior_samples": 1,
        }
        (self.results / "conditions.json").write_text(json.dumps(conditions))

    def register(self) -> registry.Registered:
        return register(self.recipe, self.places)

    @property
    def client(self) -> Any:
        return tracking.connect(self.places.tracking_uri)

    def versions(self) -> list[int]:
        versions = self.client.search_model_versions(f"name = '{NAME}'")
        return sorted(int(version.version) for version in versions)

    def champion(self) -> int:
        return int(self.client.get_registered_model(NAME).aliases["champion"])

    def moves(self) -> list[Move]:
        return history(self.client, NAME)

    def journey(self) -> list[tuple[str | None, str | None, str]]:
        """The alias's moves in short."""
        return [(move.source, move.target, move.why) for move in self.moves()]
