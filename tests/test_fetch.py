"""Raw data from a real HTTP server: whole, or going on where it broke off, or refused."""

from __future__ import annotations

import hashlib
import io
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml
from range_server import Server, range_server

from pipeline.cli.main import main
from pipeline.sources.fetch import DATA, fetch_data, held
from pipeline.system.process import try_lock
from vdvae.config import UserError

TARGET = Path("data/raw/cifar-10-binary.tar.gz")
WHOLE = bytes(range(256)) * 1000


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server with a file that is taken for CIFAR-10's archive."""
    monkeypatch.chdir(tmp_path)
    md5 = hashlib.md5(WHOLE).hexdigest()
    monkeypatch.setitem(DATA, "cifar10", (DATA["cifar10"][0]._replace(md5=md5),))
    with range_server() as address:
        Server.content = WHOLE
        yield address


def test_a_broken_download_goes_on_and_is_held_to_its_hash(
    mirror: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Server.etag, Server.cut = '"1"', 100_000
    with pytest.raises(UserError, match=r"ended after 100000 of 256000 bytes; run the same"):
        fetch_data("cifar10", mirror)
    assert not TARGET.exists()
    main(["fetch", "cifar10", "--mirror", f"{mirror}/"])
    assert f"{TARGET}: 0.2 MiB" in capsys.readouterr().out
    assert TARGET.read_bytes() == WHOLE
    assert Server.ranges == [None, "bytes=100000-"]
    assert [path.name for path in TARGET.parent.iterdir()] == [TARGET.name]
    held = json.loads(Path("data/fetched.json").read_text())
    assert held == {TARGET.name: hashlib.sha256(WHOLE).hexdigest()}
    fetch_data("cifar10", mirror)
    assert len(Server.ranges) == 2  # it is there: nobody is asked
    TARGET.write_bytes(WHOLE[:-1])
    with pytest.raises(UserError, match=r"has md5 .* remove it and run 'vdvae fetch cifar10'"):
        fetch_data("cifar10", mirror)


def test_another_file_is_not_appended_to_the_beginning_of_one(mirror: str) -> None:
    Server.content, Server.etag, Server.cut = WHOLE[::-1], '"old"', 100_000
    with pytest.raises(UserError, match="ended after"):
        fetch_data("cifar10", mirror)
    Server.content, Server.etag = WHOLE, '"new"'
    fetch_data("cifar10", mirror)
    assert TARGET.read_bytes() == WHOLE


@pytest.mark.parametrize("tells_size", [True, False])
@pytest.mark.parametrize("change", [0, 1, -1000])
def test_what_lies_there_already_is_whole_or_is_fetched_anew(
    mirror: str, tells_size: bool, change: int
) -> None:
    Server.tells_size = tells_size
    TARGET.parent.mkdir(parents=True)
    part = TARGET.with_name(f"{TARGET.name}.part")
    part.write_bytes((WHOLE + b"x")[: len(WHOLE) + change])
    fetch_data("cifar10", mirror)
    assert TARGET.read_bytes() == WHOLE
    whole = change == 0 and tells_size
    assert Server.ranges[1:] == ([] if whole or change < 0 else [None])


def test_an_answer_in_chunks_that_is_cut_is_gone_on_with(mirror: str) -> None:
    Server.chunked, Server.cut = True, 100_000
    with pytest.raises(UserError, match=r"cannot be fetched \(.+\); run the same command again"):
        fetch_data("cifar10", mirror)
    fetch_data("cifar10", mirror)
    assert TARGET.read_bytes() == WHOLE


def test_hashes_written_at_once_are_all_kept(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.bin" for number in range(20)]
    for file in files:
        file.write_bytes(file.name.encode())

    def hold(file: Path) -> None:
        with held(file, tmp_path / "sums.json"):
            pass

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(hold, files))
    assert set(json.loads((tmp_path / "sums.json").read_text())) == {file.name for file in files}


def test_a_file_without_a_published_hash_is_held_to_the_first(
    mirror: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (target,) = (raw.target for raw in DATA["ffhq256"])
    # What is not what it should be is not held to: the address of a page, or a file cut short.
    for content in (b"<html>moved</html>", npy(2)[:-1]):
        Server.content = content
        with pytest.raises(UserError, match=r"ffhq-256.npy: cannot be read as what it should be"):
            fetch_data("ffhq256", mirror)
        assert not Path("data/fetched.json").exists()
        target.unlink()
    Server.content = npy(2)
    fetch_data("ffhq256", mirror)
    target.unlink()
    Server.content = npy(3)
    with pytest.raises(UserError, match=r"sha256 is .*, data/fetched.json says"):
        fetch_data("ffhq256", mirror)


def test_a_tar_that_is_none_is_not_held_to(mirror: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATA, "imagenet32", DATA["imagenet32"][:1])
    with pytest.raises(UserError, match="cannot be read as what it should be"):
        fetch_data("imagenet32", mirror)
    assert not Path("data/fetched.json").exists()


def npy(images: int) -> bytes:
    content = io.BytesIO()
    np.save(content, np.zeros((images, 2, 2, 3), np.uint8))
    return content.getvalue()


def test_what_does_not_come_is_told_with_what_helps(
    mirror: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{taken.getsockname()[1]}"
        for address, words in (
            (f"{mirror}/gone", "404"),
            (closed, "refused"),
            ("x:y", "unknown"),
            ("http://host:abc/", "nonnumeric port"),
        ):
            with pytest.raises(SystemExit) as ended:
                main(["fetch", "imagenet32", "--mirror", address])
            said = capsys.readouterr().err
            assert ended.value.code == 2 and said.count("\n") == 1
            assert words in said
            assert "--mirror ADDRESS, or put the file at data/raw/imagenet32/train_32x32" in said
            assert "or set recipes.imagenet32.data.path" in said


def test_two_at_once_do_not_mix(mirror: str) -> None:
    TARGET.parent.mkdir(parents=True)
    with (
        try_lock(TARGET.with_name(f"{TARGET.name}.part")),  # type: ignore[union-attr]
        pytest.raises(UserError, match="another process is fetching it"),
    ):
        fetch_data("cifar10", mirror)
    assert not Server.ranges


def test_files_go_where_their_recipes_look() -> None:
    recipes = yaml.safe_load((Path(__file__).parents[1] / "params.yaml").read_text())
    for name, raws in DATA.items():
        if name == "fashion-mnist":  # its recipes look in Debian's package first
            continue
        path = Path(recipes["recipes"][name]["data"]["path"])
        for raw in raws:
            assert path in (raw.target, raw.target.parent)
