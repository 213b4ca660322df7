"""Files are written whole over files alone, and read within bounds."""

from __future__ import annotations

import json
import os
import socket
import stat
from pathlib import Path

import pytest
import torch

from pipeline.params import load_recipe
from pipeline.services.settings import Settings
from pipeline.shards.jobs import open_workers
from pipeline.system.launch import ranks_here
from pipeline.system.process import exclusive_lock, try_lock
from pipeline.tracking import connect, locked
from pipeline.yaml_files import MOST_BYTES, MOST_NESTING, parse_yaml, read_yaml
from vdvae.config import UserError
from vdvae.distributed import ranks
from vdvae.files import atomic_path, atomic_write, open_regular, parse_json, read_json


def odd_things(folder: Path) -> list[Path]:
    """What no file is to be written over, or read from: none of it outside of the folder."""
    things = [folder / name for name in ("folder", "fifo", "socket", "circle", "device")]
    things[0].mkdir()
    os.mkfifo(things[1])
    with socket.socket(socket.AF_UNIX) as made:
        here = Path.cwd()
        os.chdir(folder)  # the path of a socket is short
        made.bind("socket")
        os.chdir(here)
    things[3].symlink_to("circle")
    try:
        os.mknod(things[4], stat.S_IFCHR | 0o600, os.makedev(1, 3))  # a null device of its own
    except OSError:
        things.pop()
    link = folder / "link"
    link.symlink_to("fifo")
    return [*things, link]


def kinds(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IFMT(path.lstat().st_mode) for path in folder.iterdir()}


def test_nothing_but_a_file_is_replaced(tmp_path: Path) -> None:
    things = odd_things(tmp_path)
    before = kinds(tmp_path)
    for thing in things:
        with pytest.raises(UserError, match=f"^{thing}: "):
            atomic_write(thing, "new")
        with pytest.raises(UserError, match=f"^{thing}: "), exclusive_lock(thing, 0):
            pass
        with pytest.raises(UserError, match=f"^{thing}: "), locked(thing):
            pass
        with pytest.raises(UserError, match=f"^{thing}: "):
            try_lock(thing)
        with pytest.raises(UserError, match=f"^{os.path.realpath(thing)}: "):
            connect(f"sqlite:///{thing}")
        with pytest.raises(UserError, match=f"^{thing}: "):
            open_regular(thing)
    assert kinds(tmp_path) == before


def test_a_link_stays_and_what_it_names_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    link = tmp_path / "link"
    link.symlink_to("far/file")
    for text in ("made", "replaced"):
        atomic_write(link, text)
        assert link.is_symlink() and (tmp_path / "far/file").read_text() == text
    # A lock in its place would write the holder's number into somebody's file.
    for lock in (lambda: exclusive_lock(link, 0), lambda: locked(link)):
        with pytest.raises(UserError, match="lock is a file of its own"), lock():
            pass
    assert link.read_text() == "replaced"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_umask_decides_who_may_read_results(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        atomic_write(tmp_path / "file", "new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


def test_the_longest_name_is_written(tmp_path: Path) -> None:
    for name in ("n" * 255, "\N{PILE OF POO}" * 63):
        atomic_write(tmp_path / name, name)
        assert (tmp_path / name).read_text() == name
    with pytest.raises(OSError, match="File name too long"):
        atomic_write(tmp_path / ("n" * 256), "")
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "none"):
        raise ZeroDivisionError
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 10**5, '{"a": ' * 10**5, "9" * 5000, b"\xff\xfe", "NaN", '{"a": 1, "a": 1}'],
    ids=range(8),
)  # fmt: skip
def test_json_from_outside_is_read_or_refused_in_a_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(
        UserError, match=f"^{path}: is damaged .not readable as JSON: .*; mend it$"
    ) as caught:
        read_json(path, "mend it")
    assert len(str(caught.value)) < 600
    assert parse_json("[Infinity]", "x", "", finite=False) == [float("inf")]
    with pytest.raises(UserError, match="has more than 3 bytes; mend it"):
        path.write_text(json.dumps("long"))
        read_json(path, "mend it", most_bytes=3)


BOMB = "".join(
    f"{key}: &{key} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, key in zip("abcdefghijk", "bcdefghijkl", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, f"line 1: nested more than {MOST_NESTING} deep"),
        ("- " * 5000, f"line 1: nested more than {MOST_NESTING} deep"),
        (f"a: &a x\n{BOMB}", "values"),
        ("a: &a [*a]", "the alias 'a' names no value before it"),
        ("b: *a", "the alias 'a' names no value before it"),
        ("a: 1\nb: {c: 1, c: 1}", "line 2: the key 'c' is given twice"),
        ("a: " + "x" * 20_000, "line 1: a value of more than 10,000 characters"),
        ("a: " + "9" * 5000, "Exceeds the limit"),
        ("a: !!int abc", "invalid literal"),
        ("a: 2001-99-99", "month must be in 1..12"),
        ("a: !!timestamp abc", "groupdict"),
        ("a: !!bool perhaps", "perhaps"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
        ("? [a]\n: b", "unhashable key"),
        ("\0", "control characters"),
        (" " * (MOST_BYTES + 1), "more than 1,048,576 bytes"),
        ("--- a\n--- b", "single document"),
    ],
    ids=lambda value: value[:20],
)
def test_yaml_from_outside_is_read_or_refused_in_a_sentence(text: str, words: str) -> None:
    with pytest.raises(
        UserError, match=r"^file: not readable as YAML: .+; mend it there$"
    ) as found:
        parse_yaml(text, "file")
    assert words in str(found.value)
    assert len(str(found.value)) < 500


def test_numbers_are_read_as_dvc_writes_them() -> None:
    """`dvc exp run -S recipes.digits.train.learning_rate=1e-5` puts 1e-05 into params.yaml."""
    text = "[1e-05, 1e+30, -2E5, 1.5e3, .5e1, 1.0e-3, 12, 1.5, 'e5', e5, 1e, 1_e5, 0x1e5, 1e5a]"
    found = parse_yaml(text, "file")
    assert found == [1e-5, 1e30, -2e5, 1.5e3, 5.0, 1e-3, 12, 1.5, "e5", "e5", "1e", "1_e5", 0x1E5,
                     "1e5a"]  # fmt: skip
    assert [type(value) for value in found[:6]] == [float] * 6


def test_yaml_within_bounds_is_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text("base: &base {a: 1}\nother: {<<: *base, b: 2}\n")
    assert read_yaml(path) == {"base": {"a": 1}, "other": {"a": 1, "b": 2}}
    with pytest.raises(UserError, match="is a folder"):
        read_yaml(tmp_path)


@pytest.mark.parametrize("text", ["x" * 5000, "9" * 5000, "-1", "65536", "1.5", "http://["])
def test_numbers_and_addresses_of_the_environment_are_bounded(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("VDVAE_PREFECT_PORT", "VDVAE_RUNS_AT_ONCE", "VDVAE_ORIGIN")
    for name in names if text == "http://[" else names[:2]:
        with monkeypatch.context() as patched:
            patched.setenv(name, text)
            with pytest.raises(UserError, match=f"^{name}: ") as caught:
                Settings()
        assert len(str(caught.value)) < 300
    for name, read in (
        ("VDVAE_RANKS", lambda: ranks_here(load_recipe("digits"))),
        ("VDVAE_SHARD_WORKERS", lambda: open_workers().__enter__()),
        ("WORLD_SIZE", lambda: ranks(torch.device("cpu")).__enter__()),
    ):
        with (
            monkeypatch.context() as patched,
            pytest.raises(UserError, match=f"^{name}: ") as found,
        ):
            patched.setenv(name, text)
            read()
        assert len(str(found.value)) < 300


def test_a_rank_that_no_group_has_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "9")
    with pytest.raises(UserError, match=r"^RANK: '9' is not a number from 0 to 1"):
        ranks(torch.device("cpu")).__enter__()


def test_a_database_that_would_end_with_its_process_is_refused() -> None:
    for uri in ("sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite:///?x=1", "sqlite:x.db"):
        with pytest.raises(UserError, match=r"names no file.*write sqlite:///PATH"):
            connect(uri)
    with pytest.raises(UserError, match=r"MLflow at http://\[ does not answer"):
        connect("http://[")


def test_a_cluster_whose_address_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VDVAE_DASK", "tls://")
    with pytest.raises(UserError, match=r"^VDVAE_DASK: the scheduler at 'tls://'"), open_workers():
        pass
