"""The one owner of git: the commands that are run, and what a run records of the revision."""

from __future__ import annotations

from pipeline.system.commands import CommandFailed, output_of

# Tracked files that differ from the commit. dvc.lock does not count: every stage changes it.
CHANGES = ("status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock")


def git(*words: str) -> str:
    """What a command of git prints.

    Raises:
        CommandFailed: it fails.
        OSError: there is no git.
    """
    return output_of(["git", *words])


def revision_tags() -> dict[str, str]:
    """The git revision here, and whether tracked files differ from it; empty outside of git."""
    try:
        return {
            "git_revision": git("rev-parse", "HEAD"),
            "git_dirty": str(bool(git(*CHANGES))).lower(),
        }
    except (OSError, CommandFailed):
        return {}
