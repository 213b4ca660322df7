"""A causal convolutional model of pixels, which the paper compares its VAE with (sec. 1, Table 2).

Gated PixelCNN (van den Oord et al. 2016) with the likelihood and the shifted convolutions of
PixelCNN++ (Salimans et al. 2017): a vertical stream of all rows above, and a horizontal stream of
the pixels to the left, which reads the vertical one. What a pixel's likelihood sees are the pixels
before it, row by row; the channels of a pixel condition each other in the likelihood.

Shapes: B batch, C image channels, D width, H W, K mixtures, P likelihood parameters per pixel.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdvae.config import PixelCNNConfig, UserError
from vdvae.distributions import DiscretizedLogisticMixture, at_least_float32
from vdvae.layers import Blocks, Pointwise, activation_checkpointing, gelu, without_autocast
from vdvae.model import Elbo, network_input, normalised
from vdvae.randomness import Generators

_ROWS, _COLUMNS = (2, 3), (1, 3)  # kernels of the vertical and the horizontal stream
_COLDEST = 1e-6  # temperature: at 0 the logits would be infinite

Cache = dict[nn.Module, Tensor]  # of each convolution its last inputs


class CausalConv(nn.Conv2d):
    """A convolution whose last kernel row (vertical) or column (horizontal) is the output's own."""

    def __init__(self, width_in: int, width_out: int, kernel: tuple[int, int]) -> None:
        super().__init__(width_in, width_out, kernel)
        height, width = kernel
        self.vertical = height > 1
        self.sides = (width // 2, width // 2) if self.vertical else (width - 1, 0)
        self.above = height - 1

    def forward(self, x_BDHW: Tensor) -> Tensor:
        """The whole image: features [B,D,H,W] give features of the same height and width."""
        return super().forward(F.pad(x_BDHW, (*self.sides, self.above, 0)))

    def step(self, x_BDHW: Tensor, cache: Cache) -> Tensor:
        """The next row (vertical) or pixel (horizontal), after those that the cache remembers.

        Args:
            x_BDHW: one row [B,D,1,W] or one pixel [B,D,1,1].
            cache: gets what the next step needs.
        """
        axis, length = (2, self.above) if self.vertical else (3, self.sides[0])
        before = cache.get(self)
        if before is None:
            shape = [*x_BDHW.shape]
            shape[axis] = length
            before = x_BDHW.new_zeros(shape)
        x = torch.cat([before, x_BDHW], dim=axis)
        cache[self] = x.narrow(axis, 1, length)
        if self.vertical:
            x = F.pad(x, (*self.sides, 0, 0))
        return super().forward(x)


class GatedBlock(nn.Module):
    """A residual block of one stream: x + a · sigmoid(b), with what enters from the other one."""

    def __init__(self, width: int, kernel: tuple[int, int], enters: bool) -> None:
        super().__init__()
        self.conv1 = CausalConv(width, width, kernel)
        self.enter = Pointwise(width, width) if enters else None
        self.conv2 = CausalConv(width, 2 * width, kernel)

    def forward(
        self, x_BDHW: Tensor, other_BDHW: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Features of x's shape: of the whole image, or of the next step where a cache is given."""

        def run(convolution: CausalConv, x: Tensor) -> Tensor:
            return convolution(x) if cache is None else convolution.step(x, cache)

        h = run(self.conv1, gelu(x_BDHW))
        if self.enter is not None:
            assert other_BDHW is not None
            h = h + self.enter(gelu(other_BDHW))
        added, gate = run(self.conv2, gelu(h)).chunk(2, dim=1)
        return x_BDHW + added * torch.sigmoid(gate)


class PixelCNN(nn.Module):
    """p(x) = prod p(x_i given the pixels before it); no latents, so its bound is the likelihood.

    Images are raw uint8 [B,C,H,W], as those of `VDVAE`, with the same levels and likelihood.
    """

    latent_resolutions: tuple[int, ...] = ()

    def __init__(self, config: PixelCNNConfig) -> None:
        super().__init__()
        self.config = config
        width, image = config.width, config.image_channels + 1  # see _with_ones
        self.above = CausalConv(image, width, _ROWS)
        self.left = CausalConv(image, width, _COLUMNS)
        self.vertical: Blocks[GatedBlock] = Blocks(
            GatedBlock(width, _ROWS, enters=False) for _ in range(config.layers)
        )
        self.horizontal: Blocks[GatedBlock] = Blocks(
            GatedBlock(width, _COLUMNS, enters=True) for _ in range(config.layers)
        )
        self.likelihood = DiscretizedLogisticMixture(
            channels=config.image_channels,
            num_levels=config.num_levels,
            mixtures=config.mixtures,
            arithmetic=config.likelihood,
        )
        self.output = Pointwise(width, self.likelihood.num_parameters)
        self.checkpoint_activations_from = 0  # resolution; see TrainConfig
        self._log_prob = self.likelihood.log_prob
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                assert module.bias is not None
                module.bias.zero_()
        for block in (*self.vertical, *self.horizontal):  # as the VAE's residual blocks
            block.conv2.weight.mul_(len(self.vertical) ** -0.5)

    def compile_parts(self) -> None:
        """Lets torch.compile fuse each block, and the likelihood."""
        for block in (*self.vertical, *self.horizontal):
            block.compile(dynamic=False)
        self._log_prob = torch.compile(self._log_prob, dynamic=False)

    def parameters_of_pixels(self, input_BCHW: Tensor) -> Tensor:
        """Parameters of the mixture of logistics [B,P,H,W], each of the pixels before its own.

        Args:
            input_BCHW: the normalised images, float.
        """
        run = activation_checkpointing(self.checkpoint_activations_from)
        x = _with_ones(input_BCHW)
        vertical = self.above(F.pad(x, (0, 0, 1, -1)))  # each row sees the one above
        horizontal = vertical + self.left(F.pad(x, (1, -1)))
        for down, right in zip(self.vertical, self.horizontal, strict=True):
            vertical = run(down, vertical)
            horizontal = run(right, horizontal, vertical)
        return self.likelihood_parameters(horizontal)

    def likelihood_parameters(self, x_BDHW: Tensor) -> Tensor:
        """Parameters of the mixture of logistics: [B,P,H,W], never computed in bfloat16."""
        with without_autocast(x_BDHW.device.type):  # as of the VAE's output
            params_BPHW: Tensor = self.output(gelu(at_least_float32(x_BDHW)))
        return params_BPHW

    def forward(
        self,
        x_BCHW: Tensor,
        noise_BN: Tensor | Generators = None,
        sampled_kl: bool = False,
    ) -> Elbo:
        """Minus the log-likelihood of raw images as the distortion, with no rate.

        Args:
            x_BCHW: images, uint8.
            noise_BN: of no latents; not used.
            sampled_kl: not used.

        Returns:
            Nats per image.

        Raises:
            UserError: for images of another shape or dtype than the model's.
        """
        level_BCHW, input_BCHW = network_input(self.config, x_BCHW, self.output.weight.dtype)
        log_prob_nats_B = self._log_prob(self.parameters_of_pixels(input_BCHW), level_BCHW)
        kl_nats_LB = log_prob_nats_B.new_zeros(0, len(x_BCHW))
        return Elbo(distortion_nats_B=-log_prob_nats_B, kl_nats_LB=kl_nats_LB)

    def sample(
        self,
        n: int,
        temperature: float = 1.0,
        generator: Generators = None,
        *,
        cached: bool = True,
    ) -> Tensor:
        """Draws images pixel by pixel.

        Args:
            n: number of images, all drawn at once.
            temperature: of each pixel's mixture: logits are divided by it, scales multiplied; 0
                takes the middle of the likeliest component.
            generator: of all draws; or n of them, one per image.
            cached: keep the activations of the pixels before, so that each is computed once; False
                runs the whole network for each pixel.

        Returns:
            uint8 [n,C,H,W].

        Raises:
            UserError: for n below 1 or a negative temperature.
        """
        if n < 1:
            raise UserError(f"n: {n} images cannot be drawn; ask for at least 1")
        size = self.config.image_size
        x_BCHW = self.output.weight.new_zeros(
            (n, self.config.image_channels, size, size), dtype=torch.uint8
        )
        return self.complete(x_BCHW, 0, temperature, generator, cached=cached)

    @torch.no_grad()
    def complete(
        self,
        x_BCHW: Tensor,
        rows: int,
        temperature: float = 1.0,
        generator: Generators = None,
        *,
        cached: bool = True,
    ) -> Tensor:
        """Images whose first rows are given and whose others are drawn; see `sample`.

        Args:
            x_BCHW: images, uint8; what lies below the given rows is not read.
            rows: how many are given.
        """
        if temperature < 0:
            raise UserError(f"temperature: {temperature} is negative; use 0 or more")
        x_BCHW = x_BCHW.clone()
        x_BCHW[:, :, rows:] = 0
        _, input_BCHW = network_input(self.config, x_BCHW, self.output.weight.dtype)
        draw = self._draw_cached if cached else self._draw_plain
        for row, column, params_BPHW in draw(input_BCHW, rows):
            if temperature != 1:
                params_BPHW = self.likelihood.tempered(params_BPHW, max(temperature, _COLDEST))
            drawn_BC11 = self.likelihood.sample(params_BPHW, generator)
            _, pixel = normalised(self.config, drawn_BC11, input_BCHW.dtype)
            x_BCHW[:, :, row, column] = drawn_BC11[:, :, 0, 0]
            input_BCHW[:, :, row, column] = pixel[:, :, 0, 0]
        return x_BCHW

    def _draw_plain(self, input_BCHW: Tensor, rows: int) -> Iterator[tuple[int, int, Tensor]]:
        """Row, column and parameters [B,P,1,1] of each pixel, which is in the input at the next."""
        size = self.config.image_size
        for row, column in itertools.product(range(rows, size), range(size)):
            params_BPHW = self.parameters_of_pixels(input_BCHW)
            yield row, column, params_BPHW[:, :, row, column, None, None]

    def _draw_cached(self, input_BCHW: Tensor, rows: int) -> Iterator[tuple[int, int, Tensor]]:
        """The same, where each convolution remembers its last inputs."""
        size, of_rows = self.config.image_size, Cache()
        zeros = F.pad(input_BCHW.new_zeros(input_BCHW[:, :, :1].shape), (0, 0, 0, 0, 0, 1))
        for row in range(size):
            above = _with_ones(input_BCHW[:, :, row - 1, None]) if row else zeros
            streams = [self.above.step(above, of_rows)]
            for block in self.vertical:
                streams.append(block(streams[-1], cache=of_rows))
            of_pixels: Cache = {}
            for column in range(size) if row >= rows else ():
                here = slice(column, column + 1)
                left = zeros[:, :, :, :1]
                if column:
                    left = _with_ones(input_BCHW[:, :, row, column - 1, None, None])
                x = streams[0][:, :, :, here] + self.left.step(left, of_pixels)
                for block, stream in zip(self.horizontal, streams[1:], strict=True):
                    x = block(x, stream[:, :, :, here], cache=of_pixels)
                yield row, column, self.likelihood_parameters(x)


def _with_ones(input_BCHW: Tensor) -> Tensor:
    """The input with a channel of ones, which padding has not: so the edges are seen."""
    return F.pad(input_BCHW, (0, 0, 0, 0, 0, 1), value=1.0)
