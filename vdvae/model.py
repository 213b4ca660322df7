"""The very deep VAE (Child 2021, sec. 4 and Fig. 3; details that the paper leaves to its code).

Shapes: B batch, C image channels, H W, D width, Z latent channels, L stochastic layers,
N latent variables per image, P likelihood parameters per pixel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdvae.config import (
    DecoderBlock,
    EncoderBlock,
    ImageModelConfig,
    ModelConfig,
    UserError,
    parse_decoder,
    parse_encoder,
)
from vdvae.distributions import (
    DiscretizedLogisticMixture,
    at_least_float32,
    gaussian_kl,
    gaussian_sampled_kl,
)
from vdvae.layers import (
    Blocks,
    Pointwise,
    RunBlock,
    activation_checkpointing,
    after_gelu,
    gelu,
    pad_channels,
    run_block,
    split_channels,
    to_autocast_dtype,
    without_autocast,
)
from vdvae.levels import uint8_to_levels
from vdvae.randomness import Generators, normal


@dataclass(frozen=True)
class Elbo:
    """The terms of the evidence lower bound (eq. 1), image by image, in nats."""

    distortion_nats_B: Tensor  # -log p(x given z)
    kl_nats_LB: Tensor  # KL of each stochastic layer, or its sampled value; top first

    @property
    def rate_nats_B(self) -> Tensor:
        """Sum of the KLs."""
        return self.kl_nats_LB.sum(dim=0)

    @property
    def neg_elbo_nats_B(self) -> Tensor:
        """Rate + distortion: an upper bound on the negative log-likelihood."""
        return self.rate_nats_B + self.distortion_nats_B


def bits_per_dim(nats: Tensor | float, dims: int) -> Tensor | float:
    """Bits per dimension: nats / (C·H·W · ln 2). The one place where they are divided.

    Args:
        nats: per image.
        dims: C·H·W.
    """
    return nats / (dims * math.log(2))


def network_input(
    config: ImageModelConfig, x_BCHW: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Levels [B,C,H,W] and the normalised input of raw images, after a check.

    Args:
        config: of the model that reads them.
        x_BCHW: images, uint8.
        dtype: of the input.

    Raises:
        UserError: for images of another shape or dtype than the model's.
    """
    wanted = (config.image_channels, config.image_size, config.image_size)
    if x_BCHW.dtype != torch.uint8 or x_BCHW.dim() != 4 or x_BCHW.shape[1:] != wanted:
        raise UserError(
            f"images: {x_BCHW.dtype} of shape {tuple(x_BCHW.shape)}; this model reads "
            f"uint8 of shape (batch, {', '.join(map(str, wanted))})"
        )
    return normalised(config, x_BCHW, dtype)


def normalised(
    config: ImageModelConfig, x_BCHW: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Levels and normalised input of pixels, unchecked; see `network_input`."""
    level_BCHW = uint8_to_levels(x_BCHW, config.num_levels)
    if config.likelihood == "published_5bit":
        pixel_BCHW = x_BCHW.to(dtype)  # its encoder sees all 8 bits
    else:
        pixel_BCHW = level_BCHW.to(dtype) * (255 / (config.num_levels - 1))
    return level_BCHW, (pixel_BCHW + config.shift) * config.scale


class Bottleneck(nn.Module):
    """Four convolutions 1x1, 3x3, 3x3, 1x1, a GELU before each (Fig. 3); all 1x1 if R <= 2."""

    def __init__(
        self, width_in: int, width_inner: int, width_out: int, resolution: int, residual: bool
    ) -> None:
        super().__init__()
        self.residual = residual
        middle = (
            nn.Conv2d(width_inner, width_inner, 3, padding=1)
            if resolution > 2
            else Pointwise(width_inner, width_inner)
            for _ in range(2)
        )
        self.conv1 = Pointwise(width_in, width_inner)
        self.conv2, self.conv3 = middle
        self.conv4 = Pointwise(width_inner, width_out)

    def forward(self, x_BDHW: Tensor) -> Tensor:
        h = self.after_conv1(after_gelu(self.conv1, x_BDHW))
        return x_BDHW + h if self.residual else h

    def after_conv1(self, h_BDHW: Tensor) -> Tensor:
        """All layers after the first convolution, without the residual addition."""
        h = after_gelu(self.conv2, h_BDHW)
        h = after_gelu(self.conv3, h)
        return after_gelu(self.conv4, h)


class Encoder(nn.Module):
    """The deterministic bottom-up pass: activations by resolution."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.layout: tuple[EncoderBlock, ...] = parse_encoder(config.encoder)
        self.input = nn.Conv2d(config.image_channels, config.width, 3, padding=1)
        self.blocks: Blocks[Bottleneck] = Blocks()
        for entry in self.layout:
            width = config.width_at(entry.resolution)
            inner = int(width * config.bottleneck)
            self.blocks.append(Bottleneck(width, inner, width, entry.resolution, residual=True))

    def forward(self, x_BCHW: Tensor, run: RunBlock = run_block) -> dict[int, Tensor]:
        """Computes the bottom-up activations.

        Args:
            x_BCHW: the normalised image, float.
            run: how blocks are called.

        Returns:
            By resolution R, the GELU of the last activation [B,D,R,R] there.
        """
        x = self.input(x_BCHW)
        activations = {self.config.image_size: x}
        for entry, block in zip(self.layout, self.blocks, strict=True):
            x = run(block, x)
            if entry.pool > 1:
                x = F.avg_pool2d(x, entry.pool)
            x = pad_channels(x, self.config.width_at(entry.output_resolution))
            activations[entry.output_resolution] = x
        return {resolution: gelu(x) for resolution, x in activations.items()}


class TopDownBlock(nn.Module):
    """One stochastic layer (Fig. 3): posterior, prior, projection of z, residual block."""

    def __init__(self, config: ModelConfig, entry: DecoderBlock) -> None:
        super().__init__()
        self.resolution, self.unpool_from = entry.resolution, entry.unpool_from
        self.latent_channels = z = config.latent_channels
        width = config.width_at(self.resolution)
        inner = int(width * config.bottleneck)
        shape = (self.resolution, False)
        self.posterior = Bottleneck(2 * width, inner, 2 * z, *shape)
        self.prior = Bottleneck(width, inner, 2 * z + width, *shape)
        self.project = Pointwise(z, width)
        self.residual = Bottleneck(
            width, inner, width, self.resolution, residual=config.topdown_residual
        )

    def _prior(self, x_BDHW: Tensor, active_BDHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and log sigma of p(z given what is above), and x with the prior's residual."""
        z = self.latent_channels
        output = self.prior.after_conv1(self.prior.conv1(active_BDHW))
        parameters, residual = split_channels(output, 2 * z)
        mean_p, log_sigma_p = at_least_float32(parameters).chunk(2, dim=1)
        return mean_p, log_sigma_p, x_BDHW + residual

    def _output(self, x_BDHW: Tensor, z_BZHW: Tensor) -> Tensor:
        x: Tensor = self.residual(x_BDHW + self.project(z_BZHW))
        return x

    def forward(
        self,
        x_BDHW: Tensor,
        activation_BDHW: Tensor,
        noise_BZHW: Tensor,
        sampled_kl: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draws z from the posterior.

        Args:
            x_BDHW: the block's input features.
            activation_BDHW: GELU of the encoder's activation, the same for all blocks of a
                resolution.
            noise_BZHW: standard normal.
            sampled_kl: log q(z) - log p(z) of this z in the place of its mean, the KL.

        Returns:
            The output features [B,D,H,W], z [B,Z,H,W], and the KL in nats per image [B].
        """
        active = gelu(x_BDHW)  # for the posterior and the prior
        h = self.posterior.conv1.forward_concatenated(active, activation_BDHW)
        posterior = self.posterior.after_conv1(h)
        mean_q, log_sigma_q = at_least_float32(posterior).chunk(2, dim=1)
        mean_p, log_sigma_p, x = self._prior(x_BDHW, active)
        z = mean_q + torch.exp(log_sigma_q) * noise_BZHW
        if sampled_kl:
            kl = gaussian_sampled_kl(noise_BZHW, log_sigma_q, z, mean_p, log_sigma_p)
        else:
            kl = gaussian_kl(mean_q, log_sigma_q, mean_p, log_sigma_p)
        return self._output(x, z), z, kl.sum(dim=(1, 2, 3))

    def generate(self, x_BDHW: Tensor, z_BZHW: Tensor | None, noise_BZHW: Tensor | None) -> Tensor:
        """The output features [B,D,H,W] with a given z, or with z = mean + sigma · noise.

        Args:
            x_BDHW: the block's input features.
            z_BZHW: the latents; None draws them from the prior.
            noise_BZHW: standard normal, times the temperature; None is temperature 0.
        """
        mean_p, log_sigma_p, x = self._prior(x_BDHW, gelu(x_BDHW))
        if z_BZHW is None:
            z_BZHW = mean_p
            if noise_BZHW is not None:
                z_BZHW = mean_p + torch.exp(log_sigma_p) * noise_BZHW
        return self._output(x, z_BZHW)


class Decoder(nn.Module):
    """The top-down path: bias maps, blocks, unpooling and the output."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.layout: tuple[DecoderBlock, ...] = parse_decoder(config.decoder)
        self.blocks: Blocks[TopDownBlock] = Blocks(
            TopDownBlock(config, entry) for entry in self.layout
        )
        self.resolutions = sorted({entry.resolution for entry in self.layout})
        self.bias_maps = nn.ParameterList(
            torch.zeros(1, config.width_at(resolution), resolution, resolution)
            for resolution in self.resolutions
            if resolution <= config.no_bias_above
        )
        # Only the ablation of Fig. 5 learns its unpooling.
        self.unpools = nn.ModuleDict()
        if config.unpool == "transposed":
            for resolution, low in self.layout:
                if low is not None:
                    wide, width = config.width_at(low), config.width_at(resolution)
                    factor = resolution // low
                    self.unpools[f"{low}to{resolution}"] = nn.ConvTranspose2d(
                        wide, width, factor, stride=factor
                    )
        self.gain = nn.Parameter(torch.ones(1, config.width, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, config.width, 1, 1))
        self.likelihood = DiscretizedLogisticMixture(
            channels=config.image_channels,
            num_levels=config.num_levels,
            mixtures=config.mixtures,
            arithmetic=config.likelihood,
        )
        self.output = Pointwise(config.width, self.likelihood.num_parameters)

    def unpool(self, x_BDHW: Tensor, resolution: int) -> Tensor:
        """Brings features to a higher resolution and its width.

        Args:
            x_BDHW: features of a lower resolution.
            resolution: the higher one, R.

        Returns:
            Features [B,D,R,R].
        """
        low = x_BDHW.shape[-1]
        if self.config.unpool == "transposed":
            x: Tensor = self.unpools[f"{low}to{resolution}"](x_BDHW)
            return x
        width = self.config.width_at(resolution)
        return F.interpolate(x_BDHW[:, :width], scale_factor=resolution // low, mode="nearest")

    def likelihood_parameters(self, x_BDHW: Tensor) -> Tensor:
        """Parameters of the mixture of logistics: [B,P,H,W], never computed in bfloat16.

        Near ±1 its numbers are as far apart as half a grey level of 256.
        """
        with without_autocast(x_BDHW.device.type):
            x: Tensor = self.output(at_least_float32(x_BDHW) * self.gain + self.bias)
        return x


class _Features:
    """The features by resolution, while the blocks are run from the top down.

    With `group_size` K > 1, K consecutive blocks read what the first of them read, and what each
    adds is summed (Table 1, left: equal depth in parameters, less stochastic depth).
    """

    def __init__(self, decoder: Decoder, batch: int) -> None:
        self.decoder = decoder
        self.latest: dict[int, Tensor] = {}
        for index, resolution in enumerate(decoder.resolutions):
            if index < len(decoder.bias_maps):
                x = decoder.bias_maps[index].expand(batch, -1, -1, -1)
            else:
                width = decoder.config.width_at(resolution)
                x = decoder.gain.new_zeros((batch, width, resolution, resolution))
            self.latest[resolution] = to_autocast_dtype(x)
        self.read = dict(self.latest)
        self.blocks_begun = 0

    def _add_unpooled(self, features: dict[int, Tensor], block: TopDownBlock) -> Tensor:
        x = features[block.resolution]
        if block.unpool_from is not None:
            x = x + self.decoder.unpool(features[block.unpool_from], block.resolution)
        return x

    def input_of(self, block: TopDownBlock) -> Tensor:
        """The input features of the next block."""
        if self.blocks_begun % self.decoder.config.group_size == 0:
            self.read = dict(self.latest)
        self.blocks_begun += 1
        self.read[block.resolution] = self._add_unpooled(self.read, block)
        return self.read[block.resolution]

    def store(self, block: TopDownBlock, x_BDHW: Tensor) -> None:
        """Keeps the output features of that block."""
        if self.decoder.config.group_size > 1:
            added = x_BDHW - self.read[block.resolution]
            x_BDHW = self._add_unpooled(self.latest, block) + added
        self.latest[block.resolution] = x_BDHW

    def final(self) -> Tensor:
        """The features at the image's resolution."""
        return self.latest[self.decoder.config.image_size]


class VDVAE(nn.Module):
    """A hierarchical VAE of stochastic layers with a top-down posterior (eqs. 2 and 3).

    Images are raw uint8 [B,C,H,W]; normalisation, quantisation to `num_levels` and the target of
    the likelihood are the model's own. All randomness comes in from outside.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.checkpoint_activations_from = 0  # resolution; see TrainConfig
        self._log_prob = self.decoder.likelihood.log_prob
        self._initialise()

    def compile_parts(self) -> None:
        """Lets torch.compile fuse each block, and the likelihood.

        Blocks of one shape share their code, which the whole network, unrolled, would not.
        """
        torch._dynamo.config.recompile_limit = 64  # one entry per shape of block
        # What a convolution's gradient reads of a GELU is computed again, as without compiling.
        torch._functorch.config.ban_recompute_materialized_backward = False
        # Blocks are small already; cut at DDP's buckets they would fuse less than on one rank.
        torch._dynamo.config.optimize_ddp = False
        for block in (*self.encoder.blocks, *self.decoder.blocks):
            block.compile(dynamic=False)
        self._log_prob = torch.compile(self._log_prob, dynamic=False)

    @torch.no_grad()
    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                assert module.bias is not None
                module.bias.zero_()
        scaled = self.config.residual_scaling
        # Child 2021, sec. 4.1: scale the last convolution of N residual blocks by 1/sqrt(N).
        for bottom_up in self.encoder.blocks:
            bottom_up.conv4.weight.mul_(len(self.encoder.blocks) ** -0.5 if scaled else 1.0)
        for top_down in self.decoder.blocks:
            for convolution in (top_down.project, top_down.residual.conv4):
                convolution.weight.mul_(len(self.decoder.blocks) ** -0.5 if scaled else 1.0)
            top_down.prior.conv4.weight.zero_()  # every prior starts as N(0, 1)

    def _images(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        return network_input(self.config, x_BCHW, self.decoder.gain.dtype)

    @property
    def latent_resolutions(self) -> tuple[int, ...]:
        """That of each stochastic layer, top first."""
        return tuple(entry.resolution for entry in self.decoder.layout)

    def _noise(self, batch: int, noise: Tensor | Generators) -> Iterator[Tensor]:
        """Standard normal noise for each layer [B,Z,H,W], cut from one flat tensor [B,N]."""
        like = self.decoder.gain
        if not isinstance(noise, Tensor):
            noise = normal((batch, self.config.num_latents), noise, like)
        start = 0
        for shape in self.config.latent_shapes:
            end = start + math.prod(shape)
            yield noise[:, start:end].reshape(batch, *shape)
            start = end

    def forward(
        self,
        x_BCHW: Tensor,
        noise_BN: Tensor | Generators = None,
        sampled_kl: bool = False,
    ) -> Elbo:
        """The terms of the bound (eq. 1) for raw images, one draw of the posterior per image.

        Args:
            x_BCHW: images, uint8.
            noise_BN: standard normal noise of the posterior, or a generator that it is drawn
                from; None draws from PyTorch's global one.
            sampled_kl: log q(z) - log p(z) of the draw instead of the KLs, so that minus the
                sum is log p(x, z)/q(z given x), the log of an importance weight.

        Returns:
            Nats per image.

        Raises:
            UserError: for images of another shape or dtype than the model's.
        """
        level_BCHW, input_BCHW = self._images(x_BCHW)
        run = activation_checkpointing(self.checkpoint_activations_from)
        activations = self.encoder(input_BCHW, run)
        features = _Features(self.decoder, len(x_BCHW))
        kls: list[Tensor] = []
        noises = self._noise(len(x_BCHW), noise_BN)
        for block, noise_BZHW in zip(self.decoder.blocks, noises, strict=True):
            activation = activations[block.resolution]
            x, _, kl_nats_B = run(
                block, features.input_of(block), activation, noise_BZHW, sampled_kl
            )
            features.store(block, x)
            kls.append(kl_nats_B)
        params_BPHW = self.decoder.likelihood_parameters(features.final())
        log_prob_nats_B = self._log_prob(params_BPHW, level_BCHW)
        return Elbo(distortion_nats_B=-log_prob_nats_B, kl_nats_LB=torch.stack(kls))

    @torch.no_grad()
    def encode(
        self,
        x_BCHW: Tensor,
        mean: bool = False,
        noise_BN: Tensor | Generators = None,
    ) -> list[Tensor]:
        """Latents of images, from the posterior (eq. 3).

        Args:
            x_BCHW: images, uint8.
            mean: take each posterior's mean instead of a draw.
            noise_BN: as in `forward`.

        Returns:
            [B,Z,H,W] for each stochastic layer, top first.

        Raises:
            UserError: for images of another shape or dtype than the model's.
        """
        _, input_BCHW = self._images(x_BCHW)
        activations = self.encoder(input_BCHW)
        features = _Features(self.decoder, len(x_BCHW))
        if mean:
            noise_BN = self.decoder.gain.new_zeros(len(x_BCHW), self.config.num_latents)
        latents: list[Tensor] = []
        noises = self._noise(len(x_BCHW), noise_BN)
        for block, noise_BZHW in zip(self.decoder.blocks, noises, strict=True):
            x, z, _ = block(features.input_of(block), activations[block.resolution], noise_BZHW)
            features.store(block, x)
            latents.append(z)
        return latents

    @torch.no_grad()
    def likelihood_parameters(
        self,
        batch: int,
        latents: Sequence[Tensor] = (),
        temperature: float | Sequence[float] = 1.0,
        generator: Generators = None,
    ) -> Tensor:
        """Parameters of the mixture of logistics, from given latents and the prior for the rest.

        Args:
            batch: number of images, B.
            latents: [B,Z,H,W] of the first stochastic layers, top first.
            temperature: scale of the prior's standard deviation, one number or one per layer.
            generator: of the prior's draws; see `Generators`.

        Returns:
            [B,P,H,W].

        Raises:
            UserError: for too many latents, a negative temperature or a wrong number of them.
        """
        count = len(self.decoder.blocks)
        temperatures = (
            [float(temperature)] * count
            if isinstance(temperature, int | float)
            else [float(t) for t in temperature]
        )
        if len(temperatures) != count or min(temperatures) < 0:
            raise UserError(
                f"temperature: {temperature!r} must be one number from 0 on, or {count} of them, "
                f"one per stochastic layer"
            )
        if len(latents) > count:
            raise UserError(f"latents: {len(latents)} given, the model has {count} layers")
        features = _Features(self.decoder, batch)
        for index, block in enumerate(self.decoder.blocks):
            z, noise = None, None
            if index < len(latents):
                z = latents[index]
            elif temperatures[index] > 0:
                shape = (batch, *self.config.latent_shapes[index])
                noise = normal(shape, generator, self.decoder.gain) * temperatures[index]
            features.store(block, block.generate(features.input_of(block), z, noise))
        return self.decoder.likelihood_parameters(features.final())

    def decode(
        self,
        latents: Sequence[Tensor],
        until: int | None = None,
        temperature: float | Sequence[float] = 1.0,
        generator: Generators = None,
    ) -> Tensor:
        """Images from latents of `encode`.

        Args:
            latents: [B,Z,H,W] for each stochastic layer, top first; later layers may be left out.
            until: use only the first `until` of them; the prior gives the rest.
            temperature: scale of the prior's standard deviation in the layers that it gives.
            generator: of the prior's draws and of the pixels' (which stay at full temperature);
                or as many as images, one each.

        Returns:
            uint8 [B,C,H,W].

        Raises:
            UserError: for no or too many latents, a negative temperature or a wrong number.
        """
        if not latents:
            raise UserError("latents: none given; use sample() to draw from the prior alone")
        params_BPHW = self.likelihood_parameters(
            len(latents[0]), latents[:until], temperature, generator
        )
        return self.decoder.likelihood.sample(params_BPHW, generator)

    def sample(
        self,
        n: int,
        temperature: float | Sequence[float] = 1.0,
        generator: Generators = None,
    ) -> Tensor:
        """Draws images from the prior (eq. 2).

        Args:
            n: number of images, all drawn at once.
            temperature: scale of the prior's standard deviation, one number or one per layer; 0
                puts every latent at its prior's mean.
            generator: of all draws; or n of them, one per image.

        Returns:
            uint8 [n,C,H,W].

        Raises:
            UserError: for n below 1, a negative temperature or a wrong number of them.
        """
        if n < 1:
            raise UserError(f"n: {n} images cannot be drawn; ask for at least 1")
        params_BPHW = self.likelihood_parameters(n, (), temperature, generator)
        return self.decoder.likelihood.sample(params_BPHW, generator)
