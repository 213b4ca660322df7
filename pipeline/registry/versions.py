"""The registry, read: versions by name and alias, their bytes, and the figures they stand for."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import tracking
from pipeline.params import Places
from pipeline.registry.promotion import CONDITIONS, Figures, NotComparable
from pipeline.tracking.run import COPY
from vdvae.checkpoint import CONFIG, WEIGHTS
from vdvae.config import UserError, shown
from vdvae.files import read_csv, read_json, sha256_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

PREFIX = "vdvae-"  # of a registered model's name; the recipe's follows
DEFAULT_ALIAS = "champion"
FIGURES = ("evaluation/conditions.json", "evaluation/per_image.csv")  # in a version's folder
# The answers of MLflow's stores, with a server or without, to a name, alias or version they lack.
_NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


@dataclass(frozen=True, kw_only=True)
class Version:
    """One registered version with what was recorded about it."""

    name: str
    number: int
    aliases: tuple[str, ...]
    run_id: str
    source: str  # where its bytes lie
    tags: dict[str, str]
    description: str  # its model card
    created: str  # UTC

    @classmethod
    def of(cls, found: ModelVersion, aliases: dict[str, str]) -> Version:
        """From MLflow's own record; `aliases` are the registered model's: alias to version."""
        return cls(
            name=found.name,
            number=int(found.version),
            aliases=tuple(sorted(a for a, n in aliases.items() if str(n) == str(found.version))),
            run_id=found.run_id,
            source=found.source,
            tags=dict(found.tags),
            description=found.description or "",
            created=datetime.fromtimestamp(found.creation_timestamp / 1000, UTC).isoformat(
                timespec="seconds"
            ),
        )

    @property
    def recipe(self) -> str:
        """The recipe that it was made from."""
        return self.name.removeprefix(PREFIX)

    @property
    def passes(self) -> int:
        """Draws of the posterior an image that its figures are means of."""
        return int(self.tags.get("passes", "1"))

    @property
    def seed(self) -> int:
        """The seed of the posterior's draws with which it was evaluated."""
        return int(self.tags.get("seed", "0"))

    def figure(self, split: str) -> tuple[float, float] | None:
        """Bits/dim of a split and its standard error."""
        key = f"{split}_bits_per_dim"
        if key not in self.tags:
            return None
        return float(self.tags[key]), float(self.tags.get(f"{key}_se", "nan"))

    def __str__(self) -> str:
        return f"{self.name} version {self.number}"


def parse(reference: str) -> tuple[str, str, int | None]:
    """Name, alias and number of `NAME@ALIAS`, `NAME/VERSION` or either after `models:/`.

    A name alone means its champion. Where there is a number, the alias means nothing.

    Raises:
        UserError: for anything else.
    """
    found = re.fullmatch(r"(?:models:/)?([^/@:]+)(?:@([^/@:]+)|/([1-9]\d{0,8}))?", reference)
    if not found:
        raise UserError(
            f"{reference!r} names no model; write NAME@ALIAS, NAME/VERSION or models:/NAME@ALIAS, "
            f"such as {PREFIX}digits@{DEFAULT_ALIAS}; 'vdvae models list' shows what there is"
        )
    name, alias, number = found.groups()
    return name, alias or DEFAULT_ALIAS, int(number) if number else None


@contextmanager
def client_of(places: Places) -> Iterator[MlflowClient]:
    """The registry's client; what MLflow raises in the block is a UserError.

    Raises:
        UserError: MLflow does not answer, or its database is not there (none is made to look).
    """
    uri = places.tracking_uri
    database = tracking.sqlite_path(uri)
    if database is not None and not database.exists():
        raise UserError(
            f"{database}: there is no MLflow database; set MLFLOW_TRACKING_URI to yours, or make "
            f"a model with 'vdvae run RECIPE'"
        )
    client = tracking.connect(uri)
    with tracking.mlflow_errors(uri):
        yield client


def find(client: MlflowClient, reference: str, places: Places) -> Version:
    """The version that a reference names.

    Raises:
        UserError: there is none.
    """
    from mlflow.exceptions import MlflowException

    name, alias, number = parse(reference)
    try:
        if number is None:
            found = client.get_model_version_by_alias(name, alias)
        else:
            found = client.get_model_version(name, str(number))
        return Version.of(found, client.get_registered_model(name).aliases)
    except MlflowException as error:
        if error.error_code not in _NOT_THERE:
            raise
    where = f"MLflow at {tracking.without_credentials(places.tracking_uri)}"
    what = f"no version of {name} has the alias {alias!r}"
    if number is not None:
        what = f"{name} has no version {number}"
    again = f"run 'dvc repro -f -s register@{name.removeprefix(PREFIX)}' to register again"
    raise UserError(f"{where}: {what}; 'vdvae models list' shows what there is, or {again}")


def find_all(client: MlflowClient) -> list[Version]:
    """Every version of every `vdvae-…` model, by name and number."""
    versions = []
    token = None
    while True:
        page = client.search_registered_models(f"name LIKE '{PREFIX}%'", page_token=token)
        for model in page:
            found = client.search_model_versions(f"name = '{model.name}'")
            versions += [Version.of(version, model.aliases) for version in found]
        token = page.token
        if not token:
            return sorted(versions, key=lambda version: (version.name, version.number))


def download(version: Version, places: Places, folder: Path) -> Path:
    """Copies all that a version holds below `folder`; the folder that it is in.

    Raises:
        UserError: it is not there any more.
    """
    import mlflow.artifacts

    try:
        fetched = mlflow.artifacts.download_artifacts(
            artifact_uri=version.source,
            dst_path=str(folder / "version"),
            tracking_uri=places.tracking_uri,
        )
    except OSError as error:
        raise UserError(
            f"{version}: its files are not where MLflow has them ({error.strerror or error}); "
            f"restore the artifacts, or run 'dvc repro -f -s register@{version.recipe}' where "
            f"results/{version.recipe} is still this model's"
        ) from error
    return Path(fetched)


def fetch(version: Version, places: Places, folder: Path) -> Path:
    """Copies a version below `folder`; the folder that `vdvae.load` opens.

    Raises:
        UserError: it is not there any more, or its bytes are not those that were registered.
    """
    root = download(version, places, folder)
    model = next((path.parent for path in root.rglob(WEIGHTS)), root)
    for file, tag in ((WEIGHTS, "weights_sha256"), (CONFIG, "config_sha256")):
        path = model / file
        if not path.exists() or sha256_of(path) != version.tags.get(tag):
            raise UserError(
                f"{version}: its {file} is not what was registered; restore the artifacts, or run "
                f"'dvc repro -f -s register@{version.recipe}' where results/{version.recipe} is "
                f"still this model's"
            )
    return model


def place(tags: Mapping[str, str]) -> str:
    """Where a version lies among its run's artifacts: named by content, so twice is once."""
    content = tags["weights_sha256"] + tags["config_sha256"]
    return f"models/{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def fetch_files(
    client: MlflowClient, version: Version, names: Sequence[str], folder: Path
) -> list[Path]:
    """Copies single files of a version below `folder`.

    Raises:
        UserError: it has no such file.
    """
    root = place(version.tags)
    paths = []
    for name in names:
        path = f"{root}/{name}"
        listed = client.list_artifacts(version.run_id, path.rpartition("/")[0])
        if path not in {file.path for file in listed}:
            raise UserError(
                f"{version}: has no {name}; run 'dvc repro -f -s register@{version.recipe}' where "
                f"results/{version.recipe} is still this model's"
            )
        paths.append(Path(client.download_artifacts(version.run_id, path, str(folder))))
    return paths


def figures(client: MlflowClient, version: Version) -> Figures:
    """The validation figures of a version, image by image.

    Raises:
        NotComparable: they are not there, or are another model's or other data's.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            conditions, per_image = fetch_files(client, version, FIGURES, Path(folder))
            measured = read_json(conditions, "register it again")
            for key in ("weights_sha256", "manifest_digest"):
                if measured[key] != version.tags[key]:
                    raise NotComparable(f"the figures of {version} are of another {key}")
            bits = read_per_image(per_image, "validation")
        except (KeyError, TypeError, UserError) as error:
            raise NotComparable(f"the figures of {version} cannot be read ({error})") from None
    return Figures(
        conditions={key: version.tags[key] for key in CONDITIONS if key in version.tags},
        bits_per_dim=bits,
    )


def read_per_image(path: Path, split: str) -> dict[str, float]:
    """Bits/dim by image key of one split, from a per_image.csv.

    Raises:
        UserError: a row that is none, or a key that comes twice.
    """
    bits: dict[str, float] = {}
    for row in read_csv(path, "evaluate again"):
        try:
            if row["split"] != split:
                continue
            key, value = row["key"], float(row["bits_per_dim"])
        except (KeyError, ValueError):
            raise UserError(f"{path}: cannot read the row {shown(row)}; evaluate again") from None
        if key in bits:
            raise UserError(f"{path}: {split} has {shown(key)} twice; evaluate again")
        bits[key] = value
    return bits


@dataclass(frozen=True, kw_only=True)
class Champion:
    """A registered version with what was recorded about it, fetched to this machine."""

    version: Version
    model: Path  # folder of the weights and their config
    manifest: Path  # of the images that it was measured on
    per_image: Path  # the recorded figures, image by image


def fetch_champion(recipe_name: str, alias: str, places: Places, folder: Path) -> Champion:
    """Fetches the version of `vdvae-<recipe>` that holds the alias into `folder`.

    Raises:
        UserError: where there is none, it is damaged, or MLflow fails.
    """
    with client_of(places) as client:
        version = find(client, f"{PREFIX}{recipe_name}@{alias}", places)
        files = (f"{COPY}/{recipe_name}.json", FIGURES[1])
        manifest, per_image = fetch_files(client, version, files, folder)
        return Champion(
            version=version,
            model=fetch(version, places, folder),
            manifest=manifest,
            per_image=per_image,
        )
