"""The recipes of params.yaml where there is no YAML library: mappings, and what they merge.

params.yaml stays the one owner of its numbers; tests/test_gpu.py holds this reading of it equal to
PyYAML's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vdvae.config import ModelConfig, TrainConfig

PARAMS = Path(__file__).resolve().parents[1] / "params.yaml"
# The model's, from the data's section (pipeline/params.py).
_FROM_DATA = {
    "image_size": "image_size",
    "image_channels": "channels",
    "num_levels": "num_levels",
}
_LINE = re.compile(r'( *)([\w-]+|<<):(?: +("[^"\\]*"|\[[^\]#]*\]|[^\s#"\[][^#]*?))?(?: *| +#.*)')

_NO_TEXT = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}  # what YAML may read there


def without_studies(text: str) -> str:
    """params.yaml up to its studies, which hold sentences and come last."""
    return text.partition("\nstudies:\n")[0]


def read_plain_yaml(text: str) -> dict[str, Any]:
    """Mappings by indentation, whose values are one-line scalars and lists of them.

    Of YAML's merge keys what params.yaml uses: `key: &name`, `<<: *name` before a mapping's own
    keys, `key: {<<: *name, own: 1}`.

    Raises:
        ValueError: naming the first line that is anything else.
    """
    top: dict[str, Any] = {}
    open_at: list[tuple[int, dict[str, Any]]] = [(-1, top)]  # indentation of what has been opened
    anchored: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        if found is None:
            raise ValueError(f"line {number}: not `key:` nor `key: value`: {line.strip()[:60]!r}")
        indentation, key, value = len(found[1]), found[2], found[3]
        while open_at[-1][0] >= indentation:
            open_at.pop()
        inside = open_at[-1][1]
        if key in inside:
            raise ValueError(f"line {number}: {key} stands here twice")
        if value is None or value.startswith("&"):
            inside[key] = {}
            open_at.append((indentation, inside[key]))
            if value:
                anchored[value[1:]] = inside[key]
        elif value.startswith("{"):
            inside[key] = pairs = {}
            for own, _, text_of_it in (part.partition(": ") for part in value[1:-1].split(", ")):
                pairs[own] = _value(text_of_it, number)
        else:
            inside[key] = _value(value, number)
    return _merged(top, anchored)


def _merged(values: dict[str, Any], anchored: dict[str, dict[str, Any]]) -> dict[str, Any]:
    merged = _merged(anchored[values["<<"][1:]], anchored) if "<<" in values else {}
    for key, value in values.items():
        if key != "<<":
            merged[key] = _merged(value, anchored) if isinstance(value, dict) else value
    return merged


def _value(text: str, number: int) -> Any:
    if text.startswith("[") and text.endswith("]"):
        return [_value(part.strip(), number) for part in text[1:-1].split(",") if part.strip()]
    if text.startswith('"'):
        return text[1:-1]
    if re.fullmatch(r"\*\w+", text):
        return text  # the name of what is merged
    if text in ("true", "false"):
        return text == "true"
    if re.fullmatch(r"-?(0|[1-9]\d*)", text):
        return int(text)
    if re.fullmatch(r"-?\d+\.\d+", text):
        return float(text)
    plain = re.fullmatch(r"[A-Za-z1-9][\w./,-]*", text) and not re.fullmatch(r"[-\d_.e]+", text)
    if plain and text.lower() not in _NO_TEXT:
        return text
    raise ValueError(f"line {number}: a value that needs a YAML library: {text[:60]!r}")


def recipe(name: str, path: Path = PARAMS) -> tuple[ModelConfig, TrainConfig, int]:
    """A recipe's model, its training, and the batch of its evaluation."""
    sections = read_plain_yaml(without_studies(path.read_text()))["recipes"][name]
    shared = {ours: sections["data"][theirs] for ours, theirs in _FROM_DATA.items()}
    where = f"recipe {name!r}"
    return (
        ModelConfig.from_dict(sections["model"] | shared, where),
        TrainConfig.from_dict(sections["train"], where),
        int(sections["evaluate"]["batch_size"]),
    )
