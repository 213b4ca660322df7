"""What a model and a training run are, by value: frozen, validated, every error names its field.

Block strings are those of the paper's code (Child 2021, sec. 4): comma-separated entries, each of
`RxN` (N blocks at resolution R), `RdK` (encoder: one block at R, then average pooling by K) or
`RmS` (decoder: one block at R, into which resolution S enters by unpooling).
"""

from __future__ import annotations

import dataclasses
import math
import re
import reprlib
import sys
import types
import typing
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, NamedTuple, Self

from vdvae.levels import stored_value

MOST_BLOCKS = 1000  # on each side; the largest published model has 87
MOST_WIDTH = 2**14  # channels
_MANY = 10**9  # steps, images: more than anybody will see


class UserError(ValueError):
    """An error that the user can fix: one sentence with what, where, the value and the remedy."""


class _Shown(reprlib.Repr):
    """A repr() of any value, of bounded length and depth, that does not fail."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist = 3, 4, 6
        self.maxstring = self.maxother = self.maxlong = 100

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > 300:  # Python refuses to write out the longest ones
            return f"a number of some {int(x.bit_length() * math.log10(2)) + 1:,} digits"
        return repr(x)


def shown(value: object) -> str:
    """The repr of a user's value for messages, in some 200 characters at most."""
    text = _Shown().repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


class EncoderBlock(NamedTuple):
    """One bottom-up block: reads `resolution`, then pools by `pool` (1: no pooling)."""

    resolution: int
    pool: int

    @property
    def output_resolution(self) -> int:
        """The resolution of the activation that this block writes."""
        return self.resolution // self.pool


class DecoderBlock(NamedTuple):
    """One top-down block at `resolution`; `unpool_from` is the lower one that enters, or None."""

    resolution: int
    unpool_from: int | None


def _entries(text: str, what: str, letters: str) -> list[tuple[int, str, int]]:
    entries = []
    blocks = 0
    for entry in text.split(","):
        match = re.fullmatch(rf"\s*([1-9]\d{{0,5}})(?:([{letters}])([1-9]\d{{0,5}}))?\s*", entry)
        if match is None:
            raise UserError(
                f"{what}: cannot read the entry {shown(entry.strip())} of {shown(text)}; "
                f"write entries such as 8x2 or 8{letters[-1]}4, separated by commas"
            )
        resolution, letter, number = match.groups()
        entries.append((int(resolution), letter or "x", int(number or 1)))
        blocks += entries[-1][2] if entries[-1][1] == "x" else 1
        if blocks > MOST_BLOCKS:
            raise UserError(
                f"{what}: {shown(text)} has more than {MOST_BLOCKS:,} blocks; leave some out"
            )
    return entries


def parse_encoder(text: str) -> tuple[EncoderBlock, ...]:
    """Reads an encoder's block string (Child 2021, sec. 4), and checks its resolutions.

    Args:
        text: entries `RxN` and `RdK`, separated by commas.

    Returns:
        The blocks, bottom first.

    Raises:
        UserError: for an entry that cannot be read, or a resolution that cannot be reached.
    """
    quoted = shown(text)
    blocks: list[EncoderBlock] = []
    for resolution, letter, number in _entries(text, "model.encoder", "xd"):
        reached = blocks[-1].output_resolution if blocks else resolution
        if resolution != reached:
            raise UserError(
                f"model.encoder: resolution {resolution} of {quoted} cannot be reached: the blocks "
                f"before it end at {reached}; pool down to it, or change the resolution"
            )
        if letter == "d" and (number < 2 or resolution % number):
            raise UserError(
                f"model.encoder: {resolution}d{number} of {quoted} cannot pool {resolution} by "
                f"{number}; use a divisor of {resolution} from 2 on"
            )
        blocks += (
            [EncoderBlock(resolution, number)]
            if letter == "d"
            else [EncoderBlock(resolution, 1)] * number
        )
    return tuple(blocks)


def parse_decoder(text: str) -> tuple[DecoderBlock, ...]:
    """Reads a decoder's block string (Child 2021, sec. 4), and checks its resolutions.

    Args:
        text: entries `RxN` and `RmS`, separated by commas.

    Returns:
        The blocks, top first.

    Raises:
        UserError: for an entry that cannot be read, or a resolution that cannot be reached.
    """
    quoted = shown(text)
    blocks: list[DecoderBlock] = []
    for resolution, letter, number in _entries(text, "model.decoder", "xm"):
        entered = {block.resolution for block in blocks}
        if letter == "m":
            if number not in entered or number >= resolution or resolution % number:
                raise UserError(
                    f"model.decoder: {resolution}m{number} of {quoted}: {number} cannot enter "
                    f"{resolution}; it must be a divisor of {resolution} that has blocks before it"
                )
            blocks.append(DecoderBlock(resolution, number))
        else:
            if entered and resolution not in entered:
                raise UserError(
                    f"model.decoder: resolution {resolution} of {quoted} cannot be reached; enter "
                    f"it from a lower one first, by {resolution}m{blocks[-1].resolution}"
                )
            blocks += [DecoderBlock(resolution, None)] * number
    return tuple(blocks)


def parse_widths(text: str) -> dict[int, int]:
    """Reads `resolution:width` pairs such as `512:32,256:64`; empty text gives no pairs.

    Raises:
        UserError: for a pair that cannot be read.
    """
    widths: dict[int, int] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"([1-9]\d{0,5}):([1-9]\d{0,5})", pair)
        if match is None:
            raise UserError(
                f"model.widths: cannot read {shown(pair)} of {shown(text)}; write "
                f"resolution:width, as 512:32"
            )
        resolution, width = map(int, match.groups())
        if width > MOST_WIDTH:
            raise UserError(
                f"model.widths: {width} at {resolution} is out of bounds; it must be "
                f"{_range_words(1, MOST_WIDTH)}"
            )
        if resolution in widths:
            raise UserError(
                f"model.widths: {shown(text)} gives a width at {resolution} twice; leave one out"
            )
        widths[resolution] = width
        if len(widths) > 20:
            raise UserError(f"model.widths: {shown(text)} has more than 20 pairs; leave some out")
    return widths


Likelihood = Literal["normalised", "published", "published_5bit"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """A frozen set of values whose types, bounds and relations are checked when it is made."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            kind = hints[item.name]
            if kind is float and type(value) is int and value.bit_length() < 1000:
                value = float(value)
                object.__setattr__(self, item.name, value)
            if not _fits(value, kind):
                raise UserError(
                    f"{self.section()}.{item.name}: {shown(value)} is not {_words(kind)}"
                )
            low, high = item.metadata.get("bounds", (-math.inf, math.inf))
            if isinstance(value, int | float) and not low <= value <= high:
                raise UserError(
                    f"{self.section()}.{item.name}: {shown(value)} is out of bounds; "
                    f"it must be {_range_words(low, high)}"
                )
        self.check()

    @classmethod
    def section(cls) -> str:
        """The section of params.yaml that these values come from, for messages."""
        return cls.__name__.removesuffix("Config").lower()

    def check(self) -> None:
        """Checks relations between fields; raises UserError."""

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "") -> Self:
        """Makes a config from plain values; former names of settings are read, with a notice.

        Args:
            values: by name.
            where: the file, for messages.

        Raises:
            UserError: naming an unknown or missing key, or a value of the wrong type or range.
        """
        known = {item.name: item for item in dataclasses.fields(cls)}
        section = cls.section()
        prefix = f"{where}: " if where else ""
        if not isinstance(values, dict):
            raise UserError(
                f"{prefix}{section}: {shown(values)} is not a section of keys and values"
            )
        values = cls._renamed(values, f"{prefix}{section}")
        for key in values:
            if key not in known:
                key = key if isinstance(key, str) and len(key) <= 60 else shown(key)
                raise UserError(
                    f"{prefix}{section}.{key}: unknown key{_nearest(key, known)}; "
                    f"known are {', '.join(known)}"
                )
        for key, item in known.items():
            if key not in values and item.default is dataclasses.MISSING:
                raise UserError(f"{prefix}{section}.{key}: missing; give it a value")
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(f"{prefix}{error}") from None

    @classmethod
    def _renamed(cls, values: dict[str, Any], where: str) -> dict[str, Any]:
        """The values with today's names in the place of former ones."""
        for item in dataclasses.fields(cls):
            former = item.metadata.get("former_name")
            if former is None or former not in values:
                continue
            if values.get(item.name, values[former]) != values[former]:
                raise UserError(
                    f"{where}.{former}: is now called {item.name}, which is given, too, with "
                    f"another value; leave {former} out"
                )
            _notice(f"{where}.{former}: is now called {item.name}; rename it")
            values = {item.name if key == former else key: v for key, v in values.items()}
        return values

    def to_dict(self) -> dict[str, Any]:
        """The values as plain JSON types; `from_dict` gives the same config again."""
        return dataclasses.asdict(self)

    def fixed(self) -> dict[str, Any]:
        """The values that may not change while a run is interrupted.

        Digests of runs are made of them, so they keep the names that they had first.
        """
        return {
            item.metadata.get("former_name", item.name): getattr(self, item.name)
            for item in dataclasses.fields(self)
            if not item.metadata.get("may_change")
        }


@cache  # once per process
def _notice(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


def setting(**options: Any) -> Any:
    """A dataclass field of a Config, with what is known about it beside its type.

    Args:
        bounds: smallest and largest value, both included.
        may_change: whether an interrupted run may go on with another value.
        former_name: under which it is still read, with a notice.
        options: what else `dataclasses.field` takes, such as `default`.
    """
    names = ("bounds", "may_change", "former_name")
    metadata = {name: options.pop(name) for name in names if name in options}
    return field(metadata=metadata, **options)


def number(low: float, high: float, **options: Any) -> Any:
    """A `setting` with bounds, both included."""
    return setting(bounds=(low, high), **options)


def _fits(value: object, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(
            isinstance(part, typing.get_args(kind)[0]) for part in value
        )
    if kind is float:
        return type(value) is float and math.isfinite(value)
    return type(value) is kind


def _words(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(kind)))
    if isinstance(kind, types.UnionType):
        return " or ".join(_words(option) for option in typing.get_args(kind))
    names = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}
    return names.get(kind, str(kind))


def _range_words(low: float, high: float) -> str:
    low_words, high_words = (
        f"{bound:,}" if isinstance(bound, int) else f"{bound:g}" for bound in (low, high)
    )
    return f"from {low_words} to {high_words}"


def _nearest(key: str, known: typing.Iterable[str]) -> str:
    import difflib

    close = difflib.get_close_matches(key, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


@dataclass(frozen=True, kw_only=True)
class ImageModelConfig(Config):
    """What every model of images has: the images, the likelihood, the scale of its input."""

    image_size: int = number(1, 4096)  # pixels a side
    image_channels: int = 3  # 1 (grey) or 3 (red, green, blue)
    num_levels: int = number(2, 256, default=256)  # grey levels of the data
    mixtures: int = number(1, 1000, default=10)  # K logistics of the likelihood
    # The network's input = (pixel + shift) * scale, with pixels in 0..255.
    shift: float = number(-1e6, 1e6, default=-127.5)
    scale: float = number(-1e6, 1e6, default=1 / 127.5)
    likelihood: Likelihood = "normalised"  # the published arithmetics do not sum to 1

    @classmethod
    def section(cls) -> str:
        return "model"

    def check(self) -> None:
        if self.image_channels not in (1, 3):
            raise UserError(f"model.image_channels: {self.image_channels} is not 1 or 3")
        stored = [stored_value(level, self.num_levels) for level in range(self.num_levels)]
        if [value * self.num_levels // 256 for value in stored] != [*range(self.num_levels)]:
            raise UserError(
                f"model.num_levels: {self.num_levels} levels do not survive storage in 8 bits; "
                f"use 2 to 27, 32, 64, 128 or 256"
            )
        if self.scale == 0:
            raise UserError("model.scale: 0 would blank every image; use 1 / standard deviation")
        needed = {"published": (256, 3), "published_5bit": (32, 3)}.get(self.likelihood)
        if needed and (self.num_levels, self.image_channels) != needed:
            raise UserError(
                f"model.likelihood: {self.likelihood!r} is defined for {needed[0]} levels and "
                f"{needed[1]} channels, not {self.num_levels} and {self.image_channels}; "
                f"use 'normalised'"
            )

    @property
    def dims(self) -> int:
        """C·H·W: what bits/dim divides by."""
        return self.image_channels * self.image_size**2

    @property
    def latent_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """(Z, H, W) of each stochastic layer, top first; none where there is none."""
        return ()

    @property
    def num_latents(self) -> int:
        """N, the number of latent variables per image, over all stochastic layers."""
        return sum(math.prod(shape) for shape in self.latent_shapes)


@dataclass(frozen=True, kw_only=True)
class PixelCNNConfig(ImageModelConfig):
    """An autoregressive model of the kind that the paper compares with (its sec. 1 and Table 2)."""

    kind: Literal["pixelcnn"]
    width: int = number(1, MOST_WIDTH)  # channels D of both streams
    layers: int = number(1, MOST_BLOCKS)  # gated residual blocks of each stream


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ImageModelConfig):
    """Everything that determines a VDVAE's function (Child 2021, sec. 4); defaults as published."""

    encoder: str  # bottom-up block string
    decoder: str  # top-down block string
    width: int = number(1, MOST_WIDTH, default=384)  # channels D, where `widths` says nothing else
    widths: str = ""  # channels by resolution, "512:32,256:64"
    latent_channels: int = number(1, MOST_WIDTH, default=16)  # Z of each stochastic layer
    bottleneck: float = number(1e-3, 4, default=0.25)  # inner width of a block / its width
    no_bias_above: int = number(0, 4096, default=64)  # highest resolution with a learned bias map
    # The paper's ablations (sec. 5.1, A.1); the published models leave them as they are here.
    residual_scaling: bool = True  # last convolutions scaled by 1/sqrt(N) at the start (Table 3)
    topdown_residual: bool = True  # off: Fig. 5 "FFN"
    unpool: Literal["nearest", "transposed"] = "nearest"  # Fig. 5
    # K consecutive blocks that read one input (Table 1).
    group_size: int = number(1, MOST_BLOCKS, default=1)

    def check(self) -> None:
        super().check()
        encoder, decoder = parse_encoder(self.encoder), parse_decoder(self.decoder)
        for side, resolution in (
            ("encoder: the first", encoder[0].resolution),
            ("decoder: the last", decoder[-1].resolution),
        ):
            if resolution != self.image_size:
                raise UserError(
                    f"model.{side} block is at resolution {resolution} but images are "
                    f"{self.image_size}x{self.image_size}; make the block string and "
                    f"image_size agree"
                )
        written = {encoder[0].resolution} | {block.output_resolution for block in encoder}
        for block in decoder:
            if block.resolution not in written:
                raise UserError(
                    f"model.decoder: resolution {block.resolution} has no activation; the encoder "
                    f"writes {', '.join(map(str, sorted(written)))}: change one of the two"
                )
        lowest = encoder[-1].output_resolution
        if lowest not in {block.resolution for block in decoder}:
            raise UserError(
                f"model.encoder: no block of the decoder reads resolution {lowest}, where the "
                f"encoder ends, so its last blocks would learn nothing: change one of the two"
            )
        last: tuple[int, int] | None = None
        for resolution in sorted(written, reverse=True):
            width = self.width_at(resolution)
            if last is not None and width < last[1]:
                raise UserError(
                    f"model.widths: width falls from {last[1]} at {last[0]} to {width} at "
                    f"{resolution}; widths may only grow as the resolution falls"
                )
            last = (resolution, width)
        if self.width_at(self.image_size) != self.width:
            raise UserError(
                f"model.widths: {self.width_at(self.image_size)} at the image's resolution "
                f"{self.image_size}; there the width is model.width, {self.width}"
            )
        if int(min(self.width_at(b.resolution) for b in encoder) * self.bottleneck) < 1:
            raise UserError(
                f"model.bottleneck: {self.bottleneck} of width {self.width} leaves no channel; "
                f"raise width or bottleneck"
            )

    def to_dict(self) -> dict[str, Any]:
        """As `Config.to_dict`, in the order that config.json has had from the first: a model that
        was registered is found by that file's hash."""
        values = super().to_dict()
        return {key: values[key] for key in _FIRST} | values

    def width_at(self, resolution: int) -> int:
        """Channels of the features at a resolution."""
        return parse_widths(self.widths).get(resolution, self.width)

    @property
    def latent_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """(Z, H, W) of each stochastic layer, top first."""
        return tuple(
            (self.latent_channels, block.resolution, block.resolution)
            for block in parse_decoder(self.decoder)
        )


_FIRST = (
    "image_size", "image_channels", "num_levels", "encoder", "decoder", "width", "widths",
    "latent_channels", "bottleneck", "mixtures", "no_bias_above", "shift", "scale", "likelihood",
)  # fmt: skip

AnyModelConfig = ModelConfig | PixelCNNConfig


def model_config_of(values: dict[str, Any], where: str = "") -> AnyModelConfig:
    """The config of the kind of model that the values are of; VDVAE, where no kind is given.

    Raises:
        UserError: as `Config.from_dict`, or for another kind.
    """
    kind = values.get("kind", "vdvae") if isinstance(values, dict) else "vdvae"
    if kind == "pixelcnn":
        return PixelCNNConfig.from_dict(values, where)
    if kind != "vdvae":
        prefix = f"{where}: " if where else ""
        raise UserError(f"{prefix}model.kind: {shown(kind)} is not one of 'vdvae', 'pixelcnn'")
    if isinstance(values, dict):
        values = {key: value for key, value in values.items() if key != "kind"}
    return ModelConfig.from_dict(values, where)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """How a model is trained (Child 2021, sec. 4.2 and Table 4).

    What determines the weights may not change between a stop and going on; `may_change` marks the
    rest, some of which moves the rounding.
    """

    steps: int = number(1, _MANY, may_change=True)  # updates, skipped ones included
    batch_size: int = number(1, 10**6)  # images per update, over all devices
    learning_rate: float = number(1e-12, 10)
    # Update i runs at i / warmup_steps of the learning rate.
    warmup_steps: int = number(0, _MANY, default=100)
    weight_decay: float = number(0, 1, default=0.01)  # decoupled, on all parameters
    beta1: float = number(0, 0.999999, default=0.9)  # Adam's moments
    beta2: float = number(0, 0.999999, default=0.9)
    ema_decay: float = number(0, 1, default=0.999)  # of the averaged weights, which are the model
    gradient_clip: float = number(1e-12, 1e30, default=200.0)  # largest gradient norm, nats/dim
    # Gradient norm above which an update is skipped, nats/dim.
    skip_threshold: float = number(1e-12, 1e30, default=400.0)
    # Updates skipped in a row, after which training ends with an error.
    max_skipped_in_a_row: int = number(1, _MANY, default=100, may_change=True)
    seed: int = number(0, 2**31 - 1, default=0)  # initialisation, data order and noise
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"  # of convolutions and matrix products
    compile: bool = setting(default=False, may_change=True)  # blocks and likelihood, torch.compile
    channels_last: bool = setting(default=True, may_change=True)  # memory layout
    # Parts that each device computes its share of a batch in.
    accumulation: int = number(1, 10**6, default=1, may_change=True)
    # Activation checkpointing: blocks at this resolution and above compute their activations again
    # in the backward pass instead of keeping them; 0: none does.
    checkpoint_activations_from: int = number(
        0, 4096, default=0, may_change=True, former_name="recompute_from"
    )
    device: Literal["auto", "cpu", "cuda"] = setting(default="auto", may_change=True)
    log_every: int = number(1, _MANY, default=100)  # steps between points of the curves
    # Steps between validations; 0: never, and the last averaged weights are the model; otherwise
    # those with the best validation bits/dim.
    validate_every: int = number(0, _MANY, default=0)
    # Validations without a better one, after which training ends; 0: it goes on to the last step.
    patience: int = number(0, _MANY, default=0)
    checkpoint_every: int = number(1, _MANY, default=1000, may_change=True)  # steps
    # Most minutes between checkpoints; 0: no limit.
    checkpoint_minutes: float = number(0, 1e6, default=0.0, may_change=True)
    keep_checkpoints: int = number(1, 1000, default=2, may_change=True)  # the newest

    def check(self) -> None:
        if self.skip_threshold < self.gradient_clip:
            raise UserError(
                f"train.skip_threshold: {self.skip_threshold} is below train.gradient_clip, "
                f"{self.gradient_clip}, which would then never clip; raise it"
            )
        if self.validate_every % self.log_every:
            raise UserError(
                f"train.validate_every: {self.validate_every} is not a multiple of "
                f"train.log_every, {self.log_every}; validations are points of the curves"
            )
        if self.batch_size % self.accumulation:
            raise UserError(
                f"train.batch_size: {self.batch_size} cannot be divided by train.accumulation, "
                f"{self.accumulation}; choose a multiple of it"
            )
        if self.patience and not self.validate_every:
            raise UserError(
                f"train.patience: {self.patience} validations, but train.validate_every is 0, "
                f"never; set it"
            )
