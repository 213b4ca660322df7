"""The published model once more, in float64 and from its description alone: what vdvae is held to.

Written from the facts about the published system without sight of vdvae/, so that one mistake can't
stand in both; it agrees with the golden files, which the authors' code computed (test_oracle.py).
Nothing here is fast, trained or configurable. `python tests/oracle.py [RECIPE ...]` computes the
figures in tests/golden/whole_recipes.json once more (all five: minutes, memory below 10 GiB).

B batch, D features' width, R resolution, Z latent channels, K mixtures, C = 3, H W.
"""

from __future__ import annotations

import json
import re
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

WHOLE = Path(__file__).parent / "golden/whole_recipes.json"
Config = Mapping[str, Any]  # a published one: the JSON object of the golden files
Arrays = Mapping[str, np.ndarray]  # by published parameter name


class Figures(NamedTuple):
    """What one forward pass gives."""

    kl_BL: Tensor  # nats of each top-down block, top first
    distortion_B: Tensor  # nats
    params_BHWP: Tensor  # P = 10 K numbers a pixel, in the published order


def entries(text: str) -> Iterator[tuple[int, str, int]]:
    """(resolution, letter, number) of each block of a block string."""
    for entry in text.split(","):
        resolution, letter, number = re.fullmatch(r"(\d+)(?:([xdm])(\d+))?", entry).groups()
        for _ in range(int(number) if letter == "x" else 1):
            yield int(resolution), letter or "x", int(number or 1)


def width_at(config: Config, resolution: int) -> int:
    """Channels of the features at a resolution."""
    pairs = [pair.split(":") for pair in config["custom_width_str"].split(",") if pair]
    return {int(r): int(width) for r, width in pairs}.get(resolution, config["width"])


def bias_resolutions(config: Config) -> list[int]:
    """The resolutions that have a learned bias map, ascending."""
    resolutions = {resolution for resolution, *_ in entries(config["dec_blocks"])}
    return sorted(r for r in resolutions if r <= config["no_bias_above"])


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The shape of each published parameter."""
    made: dict[str, tuple[int, ...]] = {}

    def conv(name: str, wide_in: int, wide_out: int, kernel: int) -> None:
        made[f"{name}.weight"], made[f"{name}.bias"] = (
            (wide_out, wide_in, kernel, kernel),
            (wide_out,),
        )

    def block(name: str, wide_in: int, wide_out: int, resolution: int) -> None:
        inner = int(width_at(config, resolution) * config["bottleneck_multiple"])
        kernel = 3 if resolution > 2 else 1
        conv(f"{name}.c1", wide_in, inner, 1)
        conv(f"{name}.c2", inner, inner, kernel)
        conv(f"{name}.c3", inner, inner, kernel)
        conv(f"{name}.c4", inner, wide_out, 1)

    width, latents = config["width"], config["zdim"]
    conv("encoder.in_conv", 3, width, 3)
    for i, (resolution, *_) in enumerate(entries(config["enc_blocks"])):
        wide = width_at(config, resolution)
        block(f"encoder.enc_blocks.{i}", wide, wide, resolution)
    for i, (resolution, *_) in enumerate(entries(config["dec_blocks"])):
        name, wide = f"decoder.dec_blocks.{i}", width_at(config, resolution)
        block(f"{name}.enc", 2 * wide, 2 * latents, resolution)
        block(f"{name}.prior", wide, 2 * latents + wide, resolution)
        conv(f"{name}.z_proj", latents, wide, 1)
        block(f"{name}.resnet", wide, wide, resolution)
    for i, resolution in enumerate(bias_resolutions(config)):
        made[f"decoder.bias_xs.{i}"] = (1, width_at(config, resolution), resolution, resolution)
    made["decoder.gain"] = made["decoder.bias"] = (1, width, 1, 1)
    conv("decoder.out_net.out_conv", width, 10 * config["num_mixtures"], 1)
    return made


def uniform(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Float32 numbers of [-1, 1) that a name and a seed determine."""
    made = np.random.default_rng([seed, zlib.crc32(name.encode())]).random(shape, np.float32)
    return 2 * made - 1


def made_weights(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights by name that keep features of order one through any depth, no parameter at zero."""
    depth = {"encoder": len([*entries(config["enc_blocks"])])}
    depth["decoder"] = len([*entries(config["dec_blocks"])])
    made = {}
    for name, shape in shapes(config).items():
        size = 0.1
        if name.endswith(".weight"):
            size = (6 / np.prod(shape[1:])) ** 0.5
        if re.search(r"(enc_blocks\.\d+|resnet|prior)\.c4|z_proj", name):
            size /= depth[name.partition(".")[0]] ** 0.5  # they add up along the depth
        if ".enc.c4" in name:
            size *= 0.2  # exp(log sigma) of the draw comes back in the next block
        made[name] = np.float32(size) * uniform(name, shape, seed)
    made["decoder.gain"] += 1
    return made


def made_noise(config: Config, batch: int, seed: int = 0) -> list[np.ndarray]:
    """eps_BZRR of each top-down block, of variance 1."""
    return [
        np.float32(3**0.5) * uniform(f"noise.{i}", (batch, config["zdim"], r, r), seed)
        for i, (r, *_) in enumerate(entries(config["dec_blocks"]))
    ]


def conv(weights: Arrays, name: str, x: Tensor) -> Tensor:
    """A convolution that keeps the resolution."""
    weight, bias = (
        torch.from_numpy(weights[f"{name}.{part}"]).double() for part in ("weight", "bias")
    )
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


def block(weights: Arrays, name: str, x: Tensor) -> Tensor:
    """The bottleneck block, without its residual addition."""
    for i in (1, 2, 3, 4):
        x = conv(weights, f"{name}.c{i}", F.gelu(x))
    return x


def activations(config: Config, weights: Arrays, x_BCHW: Tensor) -> dict[int, Tensor]:
    """Bottom-up: the last features written at each resolution."""
    x = conv(weights, "encoder.in_conv", x_BCHW)
    written = {x.shape[-1]: x}
    for i, (_, letter, number) in enumerate(entries(config["enc_blocks"])):
        x = x + block(weights, f"encoder.enc_blocks.{i}", x)
        if letter == "d":
            x = F.avg_pool2d(x, number)
        x = F.pad(x, (0, 0, 0, 0, 0, width_at(config, x.shape[-1]) - x.shape[1]))
        written[x.shape[-1]] = x
    return written


def kl_nats(mean_q: Tensor, log_q: Tensor, mean_p: Tensor, log_p: Tensor) -> Tensor:
    """KL(q, p) of diagonal Gaussians by mean and log sigma, summed over all but the batch."""
    variances = ((2 * log_q).exp() + (mean_q - mean_p) ** 2) / (2 * log_p).exp()
    return (log_p - log_q - 0.5 + 0.5 * variances).flatten(1).sum(1)


class TopDown(NamedTuple):
    """What the top-down pass gives."""

    params_BPHW: Tensor
    latents: list[Tensor]  # z_BZRR by block
    kls: list[Tensor]  # nats, [B] by block, of the blocks that a posterior was given for


def top_down(
    config: Config,
    weights: Arrays,
    noise: list[np.ndarray],
    written: dict[int, Tensor] | None = None,  # with activations every z is the posterior's
    latents: Sequence[Tensor] = (),  # given z of the first blocks
    temperature: float = 1.0,
) -> TopDown:
    """The decoder: from the posterior where activations are given, else from the prior."""
    batch, size_z = noise[0].shape[:2]
    x_by_resolution = {
        r: torch.from_numpy(weights[f"decoder.bias_xs.{i}"]).double().expand(batch, -1, -1, -1)
        for i, r in enumerate(bias_resolutions(config))
    }
    drawn, kls = [], []
    for i, (r, letter, lower) in enumerate(entries(config["dec_blocks"])):
        name, wide = f"decoder.dec_blocks.{i}", width_at(config, r)
        zeros = torch.zeros(batch, wide, r, r, dtype=torch.float64)
        x = x_by_resolution.get(r, zeros)
        if letter == "m":
            entering = x_by_resolution[lower][:, :wide]
            x = x + entering.repeat_interleave(r // lower, 2).repeat_interleave(r // lower, 3)
        prior = block(weights, f"{name}.prior", x)
        mean_p, log_p, residual = prior.split([size_z, size_z, wide], 1)
        eps = torch.from_numpy(noise[i]).double()
        if i < len(latents):
            z = latents[i]
        elif written is not None:
            q = block(weights, f"{name}.enc", torch.cat([x, written[r]], 1))
            mean_q, log_q = q.chunk(2, 1)
            kls.append(kl_nats(mean_q, log_q, mean_p, log_p))
            z = mean_q + log_q.exp() * eps
        else:
            z = mean_p + temperature * log_p.exp() * eps
        x = x + residual + conv(weights, f"{name}.z_proj", z)
        x_by_resolution[r] = x + block(weights, f"{name}.resnet", x)
        drawn.append(z)
    gain, bias = (
        torch.from_numpy(weights[f"decoder.{part}"]).double() for part in ("gain", "bias")
    )
    x = x_by_resolution[config["image_size"]] * gain + bias
    return TopDown(conv(weights, "decoder.out_net.out_conv", x), drawn, kls)


def distortion_nats(config: Config, params_BPHW: Tensor, images_BHWC: np.ndarray) -> Tensor:
    """-log p(x given z), [B], in the published arithmetic: 8 bits, or 5 for ffhq_256."""
    five = config["dataset"] == "ffhq_256"
    half, log_density_width = (1 / 31, np.log(15.5)) if five else (1 / 255, np.log(127.5))
    pixels = images_BHWC // 8 * 8 if five else images_BHWC
    x_BCHW = torch.from_numpy((pixels.astype(np.float64) - 127.5) / 127.5).permute(0, 3, 1, 2)
    K = config["num_mixtures"]
    log_weights_BKHW = params_BPHW[:, :K].log_softmax(1)
    parts = [params_BPHW[:, K + 3 * K * c : K + 3 * K * (c + 1)].split(K, 1) for c in range(3)]
    (mean_r, _, c0), (mean_g, _, c1), (mean_b, _, c2) = parts
    red, green, _ = x_BCHW.split(1, 1)
    means = [
        mean_r,
        mean_g + c0.tanh() * red,
        mean_b + c1.tanh() * red + c2.tanh() * green,
    ]
    log_p = log_weights_BKHW
    for channel, (mean, (_, log_scale, _)) in enumerate(zip(means, parts, strict=True)):
        x, log_scale = x_BCHW[:, channel : channel + 1], log_scale.clamp(min=-7)
        centre = (x - mean) / log_scale.exp()
        low, high = (centre + sign * half / log_scale.exp() for sign in (-1, 1))
        mass = high.sigmoid() - low.sigmoid()
        density = centre - log_scale - 2 * F.softplus(centre) - log_density_width
        inner = torch.where(mass > 1e-5, mass.clamp(min=1e-12).log(), density)
        outer = torch.where(x > 0.999, -F.softplus(low), inner)
        log_p = log_p + torch.where(x < -0.999, F.logsigmoid(high), outer)
    return -log_p.logsumexp(1).flatten(1).sum(1)


@torch.no_grad()
def forward(
    config: Config,
    weights: Arrays,
    images_BHWC: np.ndarray,
    shift: float,
    scale: float,
    seed: int = 0,
) -> Figures:
    """One pass on uint8 images with `made_noise`."""
    pixels = images_BHWC / 255 if config["dataset"] == "ffhq_1024" else images_BHWC
    x_BCHW = (torch.from_numpy(pixels.astype(np.float64)).permute(0, 3, 1, 2) + shift) * scale
    noise = made_noise(config, len(images_BHWC), seed)
    passed = top_down(config, weights, noise, activations(config, weights, x_BCHW))
    distortion_B = distortion_nats(config, passed.params_BPHW, images_BHWC)
    return Figures(torch.stack(passed.kls, 1), distortion_B, passed.params_BPHW.permute(0, 2, 3, 1))


def image_of(config: Config) -> np.ndarray:
    """One made image, uint8 1 H W C, with smooth parts, every level and both outer ones."""
    size = config["image_size"]
    ramp = np.linspace(-0.3, 1.3, size)
    smooth = np.stack([ramp[:, None] + 0 * ramp, ramp[:, None] * ramp, 0 * ramp[:, None] + ramp], 2)
    noisy = smooth + 0.1 * uniform("image", (size, size, 3), 0)
    return np.uint8(np.clip(255 * noisy, 0, 255))[None]


def main(names: list[str]) -> None:
    """Computes the named recipes' figures (all without names) and writes each when it is done."""
    for name in names or list(json.loads(WHOLE.read_text())):
        kept = json.loads(WHOLE.read_text())
        case = kept[name]
        config, weights = case["config"], made_weights(case["config"])
        case["parameters"] = sum(array.size for array in weights.values())
        figures = forward(config, weights, image_of(config), case["shift"], case["scale"])
        case["kl_per_block"] = figures.kl_BL[0].tolist()  # nats
        case["distortion"] = figures.distortion_B[0].item()  # nats
        WHOLE.write_text(json.dumps(kept, indent=1) + "\n")
        print(f"{name}: rate {figures.kl_BL.sum():.1f}, distortion {case['distortion']:.1f} nats")


if __name__ == "__main__":
    main(sys.argv[1:])
