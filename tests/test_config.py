"""Block grammar, bounds and level arithmetic: what is refused, and in which words."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT

from pipeline.params import load_recipe
from vdvae.config import (
    DecoderBlock,
    EncoderBlock,
    ModelConfig,
    TrainConfig,
    UserError,
    parse_decoder,
    parse_encoder,
)
from vdvae.levels import levels_to_uint8, uint8_to_levels

SMALL: dict[str, Any] = {
    "image_size": 8,
    "encoder": "8x1,8d2,4d4,1x1",
    "decoder": "1x1,4m1,8m4",
    "width": 16,
}


def test_block_strings_are_read_entry_by_entry() -> None:
    assert parse_encoder("8x2,8d2,4x1") == (
        EncoderBlock(8, 1),
        EncoderBlock(8, 1),
        EncoderBlock(8, 2),
        EncoderBlock(4, 1),
    )
    assert parse_decoder("1x2,4m1,4x1") == (
        DecoderBlock(1, None),
        DecoderBlock(1, None),
        DecoderBlock(4, 1),
        DecoderBlock(4, None),
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"encoder": "8x1,4x1"}, "model.encoder: resolution 4 of '8x1,4x1' cannot be reached"),
        ({"encoder": "8x1,8d3"}, "8d3"),
        ({"encoder": "8y1"}, "cannot read the entry '8y1'"),
        ({"encoder": ""}, "cannot read the entry ''"),
        ({"decoder": "1x1,8x2"}, "model.decoder: resolution 8 of '1x1,8x2' cannot be reached"),
        ({"decoder": "1x1,4m2,8m4"}, "2 cannot enter 4"),
        ({"decoder": "1x1,2m1,8m2"}, "model.decoder: resolution 2 has no activation"),
        ({"decoder": "8x1"}, "model.encoder: no block of the decoder reads resolution"),
        ({"decoder": "1x1,4m1"}, "decoder: the last block is at resolution 4 but images are 8x8"),
        ({"image_size": 16}, "encoder: the first block is at resolution 8 but images are 16x16"),
        ({"num_levels": 100}, "100 levels do not survive storage in 8 bits"),
        ({"num_levels": 1}, "model.num_levels: 1 is out of bounds"),
        ({"image_channels": 2}, "model.image_channels: 2 is not 1 or 3"),
        ({"width": "16"}, "model.width: '16' is not a whole number"),
        ({"width": True}, "model.width: True is not a whole number"),
        ({"width": 2}, "model.bottleneck: 0.25 of width 2 leaves no channel"),
        ({"scale": float("nan")}, "model.scale: nan is not a finite number"),
        ({"widths": "4:8"}, "width falls from 16 at 8 to 8 at 4"),
        ({"widths": "4=8"}, "cannot read '4=8'"),
        ({"likelihood": "publishd"}, "model.likelihood: 'publishd' is not one of 'normalised'"),
        ({"likelihood": "published_5bit"}, "defined for 32 levels and 3 channels, not 256 and 3"),
        ({"widht": 16}, "model.widht: unknown key (did you mean 'width'?)"),
    ],
)
def test_bad_model_settings_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        ModelConfig.from_dict({**SMALL, **change})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_key_and_crossed_thresholds_are_named() -> None:
    with pytest.raises(UserError, match=r"model\.encoder: missing"):
        ModelConfig.from_dict({"image_size": 8, "decoder": "1x1"})
    with pytest.raises(UserError, match=r"train\.skip_threshold: 100\.0 is below"):
        TrainConfig(steps=1, batch_size=1, learning_rate=1e-3, skip_threshold=100)


def test_config_survives_the_way_through_json() -> None:
    config = ModelConfig.from_dict(SMALL)
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_the_file_of_a_config_stays_the_one_that_registered_models_are_found_by() -> None:
    """The hash of digits' config.json, a tag of every version of it since the first."""
    config = load_recipe("digits", ROOT / "params.yaml").model
    text = json.dumps(config.to_dict(), indent=2) + "\n"
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "a877355819cccad5d2ae728ca79b47c197ff88d852c992940c2e5feb769c3b42"
    )


@pytest.mark.parametrize("num_levels", [2, 17, 32, 256])
def test_levels_survive_storage(num_levels: int) -> None:
    levels = np.arange(num_levels)
    stored = levels_to_uint8(levels, num_levels)
    assert stored.dtype == np.uint8
    # As DESIGN defines it: v = round(255 k / (L - 1)), halves up.
    assert (stored == np.floor(255 * levels / (num_levels - 1) + 0.5)).all()
    assert (uint8_to_levels(stored, num_levels) == levels).all()
    every = np.arange(256, dtype=np.uint8)
    torched = uint8_to_levels(torch.from_numpy(every), num_levels)
    assert (uint8_to_levels(every, num_levels) == torched.numpy()).all()
    assert (torched.numpy() == every.astype(int) * num_levels // 256).all()


TRAIN: dict[str, Any] = {"steps": 1, "batch_size": 1, "learning_rate": 1e-3}


def test_a_renamed_setting_is_read_under_its_former_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for _ in range(2):  # the notice is printed once
        config = TrainConfig.from_dict({**TRAIN, "recompute_from": 8}, where="here")
    assert config.checkpoint_activations_from == 8
    assert capsys.readouterr().err == (
        "note: here: train.recompute_from: is now called checkpoint_activations_from; rename it\n"
    )
    both = {**TRAIN, "recompute_from": 8, "checkpoint_activations_from": 8}
    assert TrainConfig.from_dict(both) == config
    with pytest.raises(UserError, match=r"recompute_from: is now called .* with another value"):
        TrainConfig.from_dict({**both, "checkpoint_activations_from": 0})
    with pytest.raises(UserError, match=r"train.checkpoint_activations_from: 'x' is not a whole"):
        TrainConfig.from_dict({**TRAIN, "recompute_from": "x"})


def test_what_digests_of_runs_are_made_of_stays() -> None:
    """Another name or key here would begin every training of before anew."""
    assert [*TrainConfig.from_dict(TRAIN).fixed()] == [
        *("batch_size", "learning_rate", "warmup_steps", "weight_decay", "beta1", "beta2"),
        *("ema_decay", "gradient_clip", "skip_threshold", "seed", "precision"),
        *("log_every", "validate_every", "patience"),
    ]
    config = ModelConfig.from_dict(SMALL)
    assert config.fixed() == config.to_dict()
