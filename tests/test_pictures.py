"""Pictures of training: how often, how large, and drawn from the same noise at every step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.pictures import draw_progress, picture_interval
from vdvae.config import ModelConfig
from vdvae.model import VDVAE


def test_pictures_are_few_and_at_points_of_the_curves() -> None:
    for steps, log_every, expected in (
        (2_800, 50, 150),
        (1_100_000, 500, 55_000),
        (30, 2, 100),
        (3_000, 70, 210),
    ):
        interval = picture_interval(steps, log_every)
        assert interval == expected
        assert interval % log_every == 0
        assert steps // interval <= 20


def test_pictures_of_training_show_what_was_learnt_and_nothing_else(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VDVAE(
        ModelConfig(
            image_size=300,
            encoder="300x1,300d150,2d2,1x1",
            decoder="1x1,2m1,300m2",
            width=4,
            latent_channels=2,
            mixtures=2,
            bottleneck=0.5,
        )
    )
    x_BCHW = torch.randint(0, 256, (3, 3, 300, 300), dtype=torch.uint8)
    before = torch.get_rng_state()
    for step in (5, 6):
        draw_progress(model, x_BCHW, tmp_path, step, columns=2, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "reconstructions-000000005.png",
        "reconstructions-000000006.png",
        "samples-000000005.png",
        "samples-000000006.png",
    ]
    for kind, rows, columns in (("samples", 4, 2), ("reconstructions", 3, 4)):
        one, other = (tmp_path / f"{kind}-00000000{step}.png" for step in (5, 6))
        assert one.read_bytes() == other.read_bytes()
        sheet = np.asarray(Image.open(one))
        assert sheet.shape == (rows * 152 + 2, columns * 152 + 2, 3)  # 300 / 2, and gaps of 2
    last = sheet[306:456, 458:608].astype(float)  # the third image itself, reduced
    original = x_BCHW[2].reshape(3, 150, 2, 150, 2).double().mean(dim=(2, 4))
    assert np.abs(last - original.permute(1, 2, 0).numpy()).max() <= 1


def test_pictures_that_are_broken_off_are_whole_or_not_there(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VDVAE(
        ModelConfig(image_size=4, image_channels=1, encoder="4x1", decoder="4x1", width=4,
                    latent_channels=1, mixtures=1, bottleneck=1.0)
    )  # fmt: skip
    x_BCHW = torch.randint(0, 256, (2, 1, 4, 4), dtype=torch.uint8)
    for asked, whole in ((1, []), (4, []), (6, ["samples-000000005.png"])):
        questions = iter(range(1, asked))
        with pytest.raises(StopIteration):
            draw_progress(model, x_BCHW, tmp_path, 5, columns=1, seed=1,
                          between=lambda questions=questions: next(questions))  # fmt: skip
        assert [path.name for path in tmp_path.iterdir()] == whole
