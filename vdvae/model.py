"""The very deep VAE (Child 2021, sec. 4 and Fig. 3; details that the paper leaves to its code).

Shapes: B batch, C image channels, H W, D width, Z latent channels, L stochastic layers,
N latent variables an image, P likelihood parameters a pixel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vdvae.config import (
    DecoderBlock,
    EncoderBlock,
    ModelConfig,
    UserError,
    parse_decoder,
    parse_encoder,
    uint8_to_levels,
)
from vdvae.distributions import (
    Generators,
    dmol_log_prob,
    dmol_parameters,
    dmol_sample,
    drawn,
    gaussian_kl,
    gaussian_log_ratio,
)

BlockT = TypeVar("BlockT", bound=nn.Module)


@dataclass(frozen=True)
class Elbo:
    """The terms of the evidence lower bound (eq. 1), image by image, in nats."""

    distortion_nats_B: Tensor  # -log p(x given z)
    kl_nats_LB: Tensor  # KL of each stochastic layer, or log q - log p at the draw; top first

    @property
    def rate_nats_B(self) -> Tensor:
        """Sum of the KLs."""
        return self.kl_nats_LB.sum(dim=0)

    @property
    def neg_elbo_nats_B(self) -> Tensor:
        """Rate + distortion: an upper bound on the negative log-likelihood."""
        return self.rate_nats_B + self.distortion_nats_B


def bits_per_dim(nats: Tensor | float, dims: int) -> Tensor | float:
    """Bits/dim of nats an image: nats / (C·H·W · ln 2). The one place where they are divided."""
    return nats / (dims * math.log(2))


Run = Callable[..., Any]  # how a block is called: with itself first, then what it reads


def _plainly(block: nn.Module, *inputs: Any) -> Any:
    return block(*inputs)


class Blocks(nn.ModuleList, Generic[BlockT]):
    """A ModuleList that knows the type of its blocks."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[BlockT]: ...


class Pointwise(nn.Conv2d):
    """A 1x1 convolution; over channels-last features it is one matrix product.

    That is up to 40% faster where the features are small, and no slower elsewhere (benchmarks/).
    """

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out, 1)

    def forward(self, x_BDHW: Tensor) -> Tensor:
        return _pointwise(x_BDHW, self.weight, self.bias)

    def of_parts(self, x_BDHW: Tensor, y_BDHW: Tensor) -> Tensor:
        """The convolution of cat[x, y], which is not made."""
        width = x_BDHW.shape[1]
        x = _pointwise(x_BDHW, self.weight[:, :width], None)
        return x + _pointwise(y_BDHW, self.weight[:, width:], self.bias)


def _pointwise(x_BDHW: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not x_BDHW.is_contiguous(memory_format=torch.channels_last):
        return F.conv2d(x_BDHW, weight, bias)
    x_BHWD = x_BDHW.permute(0, 2, 3, 1)
    return F.linear(x_BHWD, weight[:, :, 0, 0], bias).permute(0, 3, 1, 2)


def _split_channels(x_BDHW: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The first channels and the rest; the gradients of both are joined in the layout of x."""
    sizes = [first, x_BDHW.shape[1] - first]
    if not x_BDHW.is_contiguous(memory_format=torch.channels_last):
        one, other = torch.split(x_BDHW, sizes, dim=1)
        return one, other
    one, other = torch.split(x_BDHW.permute(0, 2, 3, 1), sizes, dim=3)
    return one.permute(0, 3, 1, 2), other.permute(0, 3, 1, 2)


class Bottleneck(nn.Module):
    """Four convolutions 1x1, 3x3, 3x3, 1x1, a GELU before each; 1x1 throughout where R <= 2."""

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
        h = self.after_first(self.conv1(F.gelu(x_BDHW)))
        return x_BDHW + h if self.residual else h

    def after_first(self, h_BDHW: Tensor) -> Tensor:
        """All that follows the first convolution, without the residual addition."""
        h: Tensor = self.conv2(F.gelu(h_BDHW))
        h = self.conv3(F.gelu(h))
        h = self.conv4(F.gelu(h))
        return h


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

    def forward(self, x_BCHW: Tensor, run: Run | None = None) -> dict[int, Tensor]:
        """GELU of the activations [B,D,R,R] by resolution R: of the last one written there."""
        run = run or _plainly
        x = self.input(x_BCHW)
        activations = {self.config.image_size: x}
        for entry, block in zip(self.layout, self.blocks, strict=True):
            x = run(block, x)
            if entry.pool > 1:
                x = F.avg_pool2d(x, entry.pool)
            x = _pad_channels(x, self.config.width_at(entry.output_resolution))
            activations[entry.output_resolution] = x
        return {resolution: F.gelu(x) for resolution, x in activations.items()}


def _pad_channels(x_BDHW: Tensor, width: int) -> Tensor:
    missing = width - x_BDHW.shape[1]
    return F.pad(x_BDHW, (0, 0, 0, 0, 0, missing)) if missing else x_BDHW


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
        found = self.prior.after_first(self.prior.conv1(active_BDHW))
        parameters, residual = _split_channels(found, 2 * z)
        mean_p, log_sigma_p = at_least_float32(parameters).chunk(2, dim=1)
        return mean_p, log_sigma_p, x_BDHW + residual

    def _leave(self, x_BDHW: Tensor, z_BZHW: Tensor) -> Tensor:
        x: Tensor = self.residual(x_BDHW + self.project(z_BZHW))
        return x

    def forward(
        self,
        x_BDHW: Tensor,
        activation_BDHW: Tensor,
        noise_BZHW: Tensor,
        at_the_draw: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draws z from the posterior: features that leave, z, and the KL [B] in nats.

        Args:
            x_BDHW: features that enter.
            activation_BDHW: GELU of the encoder's activation, the same for all blocks of a
                resolution.
            noise_BZHW: standard normal.
            at_the_draw: log q(z) - log p(z) of this z in the place of the KL, its mean.
        """
        # The posterior's GELU and first convolution of cat[x, activation], without the cat: GELU of
        # x is the prior's, too.
        active = F.gelu(x_BDHW)
        h = self.posterior.conv1.of_parts(active, activation_BDHW)
        posterior = self.posterior.after_first(h)
        mean_q, log_sigma_q = at_least_float32(posterior).chunk(2, dim=1)
        mean_p, log_sigma_p, x = self._prior(x_BDHW, active)
        z = mean_q + torch.exp(log_sigma_q) * noise_BZHW
        if at_the_draw:
            kl = gaussian_log_ratio(noise_BZHW, log_sigma_q, z, mean_p, log_sigma_p)
        else:
            kl = gaussian_kl(mean_q, log_sigma_q, mean_p, log_sigma_p)
        return self._leave(x, z), z, kl.sum(dim=(1, 2, 3))

    def generate(self, x_BDHW: Tensor, z_BZHW: Tensor | None, noise_BZHW: Tensor | None) -> Tensor:
        """Features that leave with a given z, or with z = mean + sigma · noise of the prior.

        Temperature is the scale of the noise that the caller passes; None is temperature 0.
        """
        mean_p, log_sigma_p, x = self._prior(x_BDHW, F.gelu(x_BDHW))
        if z_BZHW is None:
            z_BZHW = mean_p
            if noise_BZHW is not None:
                z_BZHW = mean_p + torch.exp(log_sigma_p) * noise_BZHW
        return self._leave(x, z_BZHW)


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
        self.output = Pointwise(
            config.width, dmol_parameters(config.image_channels, config.mixtures)
        )

    def unpool(self, x_BDHW: Tensor, resolution: int) -> Tensor:
        """Features of a lower resolution, brought to a higher one and to its width."""
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
        with _without_autocast(x_BDHW.device.type):
            x: Tensor = self.output(at_least_float32(x_BDHW) * self.gain + self.bias)
        return x


def _without_autocast(kind: str) -> AbstractContextManager[object]:
    available = torch.amp.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if available else nullcontext()


def _of_autocast(x: Tensor) -> Tensor:
    """In the type of autocast's convolutions, so that what they add to it is not cast back."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x


class _Features:
    """The features by resolution while the blocks are walked from the top down.

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
            self.latest[resolution] = _of_autocast(x)
        self.read = dict(self.latest)
        self.entered = 0

    def _enter(self, features: dict[int, Tensor], block: TopDownBlock) -> Tensor:
        x = features[block.resolution]
        if block.unpool_from is not None:
            x = x + self.decoder.unpool(features[block.unpool_from], block.resolution)
        return x

    def enter(self, block: TopDownBlock) -> Tensor:
        """What this block reads."""
        if self.entered % self.decoder.config.group_size == 0:
            self.read = dict(self.latest)
        self.entered += 1
        self.read[block.resolution] = self._enter(self.read, block)
        return self.read[block.resolution]

    def leave(self, block: TopDownBlock, x_BDHW: Tensor) -> None:
        """Takes what this block wrote."""
        if self.decoder.config.group_size > 1:
            added = x_BDHW - self.read[block.resolution]
            x_BDHW = self._enter(self.latest, block) + added
        self.latest[block.resolution] = x_BDHW

    def last(self) -> Tensor:
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
        self.recompute_from = 0  # resolution; see TrainConfig
        self._log_prob = dmol_log_prob
        self._initialise()

    def compile_parts(self) -> None:
        """Lets torch.compile fuse each block, and the likelihood.

        Blocks of one shape share their code, which the whole network, unrolled, would not.
        """
        torch._dynamo.config.recompile_limit = 64  # one entry a shape of block
        # Blocks are small already; cut at DDP's buckets they would fuse less than on one rank.
        torch._dynamo.config.optimize_ddp = False
        for block in (*self.encoder.blocks, *self.decoder.blocks):
            block.compile(dynamic=False)
        self._log_prob = torch.compile(dmol_log_prob, dynamic=False)

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
        """Levels [B,C,H,W] and the encoder's input of checked images."""
        config = self.config
        wanted = (config.image_channels, config.image_size, config.image_size)
        if x_BCHW.dtype != torch.uint8 or x_BCHW.dim() != 4 or x_BCHW.shape[1:] != wanted:
            raise UserError(
                f"images: {x_BCHW.dtype} of shape {tuple(x_BCHW.shape)}; this model reads "
                f"uint8 of shape (batch, {', '.join(map(str, wanted))})"
            )
        level_BCHW = uint8_to_levels(x_BCHW, config.num_levels)
        if config.likelihood == "published_5bit":
            pixel_BCHW = x_BCHW.to(self.decoder.gain.dtype)  # its encoder sees all 8 bits
        else:
            pixel_BCHW = level_BCHW.to(self.decoder.gain.dtype) * (255 / (config.num_levels - 1))
        return level_BCHW, (pixel_BCHW + config.shift) * config.scale

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
        at_the_draw: bool = False,
    ) -> Elbo:
        """The terms of the bound for raw images, one draw of the posterior an image.

        Args:
            x_BCHW: images, uint8.
            noise_BN: standard normal noise of the posterior, or a generator that it is drawn
                from; None draws from PyTorch's global one.
            at_the_draw: log q(z) - log p(z) of the draw instead of the KLs, so that minus the
                sum is log p(x, z)/q(z given x), the log of an importance weight.

        Raises:
            UserError: for images of another shape or dtype than the model's.
        """
        level_BCHW, input_BCHW = self._images(x_BCHW)
        run = self._keeping_less if self.recompute_from and torch.is_grad_enabled() else _plainly
        activations = self.encoder(input_BCHW, run)
        features = _Features(self.decoder, len(x_BCHW))
        kls: list[Tensor] = []
        noises = self._noise(len(x_BCHW), noise_BN)
        for block, noise_BZHW in zip(self.decoder.blocks, noises, strict=True):
            activation = activations[block.resolution]
            x, _, kl_nats_B = run(block, features.enter(block), activation, noise_BZHW, at_the_draw)
            features.leave(block, x)
            kls.append(kl_nats_B)
        params_BPHW = self.decoder.likelihood_parameters(features.last())
        log_prob_nats_B = self._log_prob(
            params_BPHW, level_BCHW, self.config.num_levels, self.config.likelihood
        )
        return Elbo(distortion_nats_B=-log_prob_nats_B, kl_nats_LB=torch.stack(kls))

    def _keeping_less(self, block: nn.Module, x_BDHW: Tensor, *others: Any) -> Any:
        if x_BDHW.shape[-1] < self.recompute_from:
            return block(x_BDHW, *others)
        # No block draws anything: its noise comes in.
        return checkpoint(block, x_BDHW, *others, use_reentrant=False, preserve_rng_state=False)

    @torch.no_grad()
    def encode(
        self,
        x_BCHW: Tensor,
        mean: bool = False,
        noise_BN: Tensor | Generators = None,
    ) -> list[Tensor]:
        """Latents of images, one [B,Z,H,W] a stochastic layer, top first.

        Args:
            x_BCHW: images, uint8.
            mean: take each posterior's mean instead of a draw.
            noise_BN: as in `forward`.
        """
        _, input_BCHW = self._images(x_BCHW)
        activations = self.encoder(input_BCHW)
        features = _Features(self.decoder, len(x_BCHW))
        if mean:
            noise_BN = self.decoder.gain.new_zeros(len(x_BCHW), self.config.num_latents)
        latents: list[Tensor] = []
        noises = self._noise(len(x_BCHW), noise_BN)
        for block, noise_BZHW in zip(self.decoder.blocks, noises, strict=True):
            x, z, _ = block(features.enter(block), activations[block.resolution], noise_BZHW)
            features.leave(block, x)
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
        """Mixture parameters [B,P,H,W] from the first latents given and the prior for the rest."""
        count = len(self.decoder.blocks)
        temperatures = (
            [float(temperature)] * count
            if isinstance(temperature, int | float)
            else [float(t) for t in temperature]
        )
        if len(temperatures) != count or min(temperatures) < 0:
            raise UserError(
                f"temperature: {temperature!r} must be one number from 0 on, or {count} of them, "
                f"one a stochastic layer"
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
            features.leave(block, block.generate(features.enter(block), z, noise))
        return self.decoder.likelihood_parameters(features.last())

    def decode(
        self,
        latents: Sequence[Tensor],
        until: int | None = None,
        temperature: float | Sequence[float] = 1.0,
        generator: Generators = None,
    ) -> Tensor:
        """Images, uint8 [B,C,H,W], from latents of `encode`.

        Args:
            latents: one [B,Z,H,W] a stochastic layer, top first; later layers may be left out.
            until: use only the first `until` of them; the prior gives the rest.
            temperature: scale of the prior's standard deviation in the layers that it gives.
            generator: of the prior's draws and of the pixels' (which stay at full temperature);
                or as many as images, one each.
        """
        if not latents:
            raise UserError("latents: none given; use sample() to draw from the prior alone")
        return self._pixels(
            self.likelihood_parameters(len(latents[0]), latents[:until], temperature, generator),
            generator,
        )

    def sample(
        self,
        n: int,
        temperature: float | Sequence[float] = 1.0,
        generator: Generators = None,
    ) -> Tensor:
        """Draws n images, uint8 [n,C,H,W]; temperature 0 puts every latent at its prior's mean.

        Args:
            n: how many, all at once.
            temperature: scale of the prior's standard deviation, one number or one a layer.
            generator: of all draws; or n of them, one an image.
        """
        if n < 1:
            raise UserError(f"n: {n} images cannot be drawn; ask for at least 1")
        return self._pixels(self.likelihood_parameters(n, (), temperature, generator), generator)

    def _pixels(self, params_BPHW: Tensor, generator: Generators) -> Tensor:
        config = self.config
        return dmol_sample(
            params_BPHW, config.image_channels, config.num_levels, config.likelihood, generator
        )


def at_least_float32(x: Tensor) -> Tensor:
    """What a KL or a likelihood is computed from: never in bfloat16, whatever came before."""
    return x.float() if x.dtype == torch.bfloat16 else x


def normal(shape: tuple[int, ...], generator: Generators, like: Tensor) -> Tensor:
    """Standard normal noise on `like`'s device, drawn on the generator's own device."""
    return drawn(torch.randn, shape, generator, like.device, like.dtype)
