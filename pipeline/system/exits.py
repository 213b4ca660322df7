"""How a command ends: its exit codes, the user's errors in one sentence, a reader that left."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn, TextIO

from vdvae.config import UserError
from vdvae.files import shown_path

BAD_INPUT = 2  # an error that the user can mend
UNAVAILABLE = 75  # a server did not answer (sysexits' EX_TEMPFAIL): the same command may work later
CANCELLED = 143  # after SIGTERM: 128 + 15
_LONGEST = 2000  # characters of an error
_READER_GONE = 141  # as if by SIGPIPE: 128 + 13


class ServerUnavailable(UserError):
    """A server that something lies on does not answer, or says that the fault is its own."""


def fail(error: UserError | str) -> NoReturn:
    """Says what is wrong in one line and exits: BAD_INPUT, or UNAVAILABLE where that is behind it.

    An error with `sentences`, about one file each, gets a line for each.
    """
    for each in getattr(error, "sentences", [error]):
        sentence = " ".join(str(each).split())
        if len(sentence) > _LONGEST:  # what somebody else wrote is repeated in it
            sentence = f"{sentence[: _LONGEST // 2]} … {sentence[-_LONGEST // 2 :]}"
        print(f"error: {sentence}", file=sys.stderr, flush=True)
    behind: BaseException | None = error if isinstance(error, UserError) else None
    while behind is not None and not isinstance(behind, ServerUnavailable):
        behind = behind.__cause__ or behind.__context__
    sys.exit(BAD_INPUT if behind is None else UNAVAILABLE)


def machine_error(error: OSError) -> str | None:
    """What a machine that cannot take or give a file lacks, in one sentence.

    None where no file is at fault: then the error is ours.
    """
    remedies = {
        errno.ENOSPC: "the disk is full; free some space, then run the same command again",
        errno.EDQUOT: "the disk quota is used up; free some space, then run the same command again",
        errno.EACCES: "permission denied; change its owner or mode, or choose another place",
        errno.EPERM: "not permitted; change its owner or mode, or choose another place",
        errno.EROFS: "the file system is read-only; choose another place",
    }
    named = isinstance(error.filename, str | bytes | os.PathLike) and error.filename
    name = (
        shown_path(Path(os.fsdecode(error.filename))) if named else "a file that was being written"
    )
    if error.errno in remedies:
        return f"{name}: {remedies[error.errno]}"
    if not named or error.strerror is None:
        return None
    return f"{name}: cannot be used ({error.strerror}); check the path, or name another place"


def innermost(error: BaseException) -> str:
    """The first line of what an error began with, in 300 characters."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def as_a_command() -> Iterator[None]:
    """Ends the program in one sentence for a UserError, and quietly in `… | head -1`."""
    try:
        try:
            yield
        except UserError as error:
            fail(error)
        except BrokenPipeError:
            raise
        except OSError as error:
            sentence = machine_error(error)
            if sentence is None:
                raise
            fail(sentence)
        finally:
            sys.stdout.flush()  # at the interpreter's own end it would be too late
    except BrokenPipeError:
        gone = [stream for stream in (sys.stdout, sys.stderr) if _has_lost_its_reader(stream)]
        if not gone:
            raise  # another pipe: a fault of ours
        for stream in gone:  # what they still hold goes nowhere, without a second error
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(_READER_GONE)


def _has_lost_its_reader(stream: TextIO) -> bool:
    poll = select.poll()
    poll.register(stream.fileno(), 0)  # an error is told unasked
    return bool(poll.poll(0))
