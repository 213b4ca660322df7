"""What the documentation names is there: files, links, headings, commands, code."""

from __future__ import annotations

import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURE = "docs/architecture.md"
PAGES = ["README.md", "CHANGELOG.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
_LINE = re.compile(r"( *)(\S+)(?: {2,}(\S.*))?")


def named_files(text: str) -> Iterator[str]:
    """The paths in an indented tree: two spaces a level, folders end with a slash.

    A folder stands for its `__init__.py`.
    """
    folders: list[str] = []
    for line in text.splitlines():
        found = _LINE.fullmatch(line)
        assert found, f"{ARCHITECTURE}: {line!r} is not a name, two spaces or more, and a phrase"
        indent, name, phrase = found.groups()
        assert phrase, f"{ARCHITECTURE}: {name} has no phrase; say in a few words what it is"
        level = len(indent) // 2
        assert level <= len(folders), f"{ARCHITECTURE}: {name} is indented too far"
        del folders[level:]
        path = "".join(folders) + name
        if name.endswith("/"):
            folders.append(name)
            path += "__init__.py"
        yield path


def test_the_tree_names_every_file_and_no_other() -> None:
    page = (ROOT / ARCHITECTURE).read_text()
    tree = re.search(r"<!-- tree -->\n```text\n(.*?)\n```\n<!-- /tree -->", page, re.DOTALL)
    assert tree, f"{ARCHITECTURE}: no tree between the marks <!-- tree --> and <!-- /tree -->"
    named = list(named_files(tree[1]))
    there = {
        path.relative_to(ROOT).as_posix()
        for package in ("vdvae", "pipeline")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    sentences = [f"{path} is named but not there: remove its line" for path in named]
    sentences = [s for s, path in zip(sentences, named, strict=True) if path not in there]
    sentences += [f"{path} is not named: add a line" for path in sorted(there - set(named))]
    sentences += [f"{p} is named twice" for p in sorted({p for p in named if named.count(p) > 1})]
    assert not sentences, f"{ARCHITECTURE}: the tree and the files differ:\n" + "\n".join(sentences)


def _without_code(text: str) -> str:
    """The page without its code blocks, in which brackets are no links and # is no heading."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^ {4,}\S.*$", "", text, flags=re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page in its links."""
    headings = re.findall(r"^#+ +(.+)$", _without_code(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files_and_headings(name: str) -> None:
    page = ROOT / name
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", _without_code(page.read_text())):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists():
            wrong.append(f"{name}: {link}: there is no file {path}")
        elif anchor and anchor not in anchors(target):
            wrong.append(f"{name}: {link}: no heading of {path or name} is called so")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", [page for page in PAGES if page != "CHANGELOG.md"])
def test_code_that_is_named_is_there(name: str) -> None:
    """Files in `code spans`, from the root or from pipeline/, and dotted names of the packages."""
    wrong = []
    for span in re.findall(r"`([^`\n]+)`", _without_code((ROOT / name).read_text())):
        for path in re.findall(r"(?<![\w./-])(?:[\w-]+/)+[\w-]+\.py\b", span):
            if not (ROOT / path).exists() and not (ROOT / "pipeline" / path).exists():
                wrong.append(f"{name}: there is no file {path}")
        if re.fullmatch(r"(vdvae|pipeline)(\.\w+)+", span):
            try:
                pkgutil.resolve_name(span)
            except (ImportError, AttributeError):
                wrong.append(f"{name}: there is no {span}")
    assert not wrong, "\n".join(wrong)


def _commands(text: str, program: str) -> set[str]:
    """The words after a program's name where a span or a line of code begins with it."""
    spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
    lines = re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)
    found = (re.match(rf"{program}\s+([a-z][a-z-]*)", code) for code in spans + lines)
    return {match[1] for match in found if match}


def test_make_has_the_targets_that_are_named() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    for name in PAGES:
        for word in _commands((ROOT / name).read_text(), "make"):
            assert word in targets, f"{name}: 'make {word}': the Makefile has no such target"


def test_the_readme_names_commands_that_are_there() -> None:
    """`--help` lists the words, whatever library parses them."""
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["vdvae"]
    module, _, function = entry.partition(":")
    for program in ("vdvae", "vdvae models"):
        run = subprocess.run(
            [
                sys.executable,
                "-c",
                f"import sys; sys.argv[0] = 'vdvae'; from {module} import {function}; {function}()",
                *program.split()[1:],
                "--help",
            ],
            cwd=ROOT,
            env={**os.environ, "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=True,
        )
        for word in _commands((ROOT / "README.md").read_text(), program):
            assert re.search(rf"\b{word}\b", run.stdout), f"README.md: no '{program} {word}'"


def test_the_readme_s_python_runs(tmp_path: Path) -> None:
    import vdvae

    config = vdvae.ModelConfig(
        image_size=8, image_channels=1, num_levels=17, encoder="8x1,8d8,1x1", decoder="1x1,8m1",
        width=8, latent_channels=2, shift=-77.8, scale=0.0104,
    )  # fmt: skip
    vdvae.save(vdvae.VDVAE(config), tmp_path)
    text = (ROOT / "README.md").read_text()
    code = re.search(r"```python\n(.*?vdvae\.load.*?)```", text, re.DOTALL)
    assert code, "README.md: no Python block with vdvae.load"
    block = code[1].replace("results/digits/model", str(tmp_path))
    found: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), found)
