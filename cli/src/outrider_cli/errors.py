"""What can go wrong, and the exit code that tells it. Each error is one line for people."""

from enum import IntEnum


class Exit(IntEnum):
    """Exit codes; docs/cli.md explains them."""

    OK = 0
    #: A node did not succeed.
    NODES = 1
    #: Wrong flags or arguments.
    USAGE = 2
    #: The cluster cannot be reached, refused, or has no such object.
    CLUSTER = 3
    #: Not ended, or not all there, within the time given.
    INCOMPLETE = 4
    #: Left by Ctrl-C; the task may still run.
    LEFT = 130


class CommandError(Exception):
    """Ends the command with one line and an exit code."""

    code = Exit.CLUSTER


class UsageError(CommandError):
    """Wrong flags or arguments."""

    code = Exit.USAGE


class IncompleteError(CommandError):
    """Something is not there within the time given."""

    code = Exit.INCOMPLETE


class LeftError(CommandError):
    """The user left while a task was under way."""

    code = Exit.LEFT


class ClusterError(CommandError):
    """The API server refused a request."""


class NotFoundError(ClusterError):
    """There is no such object."""


class ConflictError(ClusterError):
    """An object of this name is there already."""


class UnavailableError(ClusterError):
    """No answer from the API server, or one that asks to come back later."""


def one_line(error: object) -> str:
    """An error of another library as one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 1000 else text[:1000] + "…"
