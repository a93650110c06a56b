"""Who a run is of: users from the text of passwd and group files.

The host's users are not those of the agent's container, so the system's own look-up cannot be
asked for them. Reads no file itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass

#: The largest user and group id; one more means "leave it as it is" to the kernel.
MAX_ID = 2**32 - 2


@dataclass(frozen=True)
class Account:
    """A user.

    Attributes:
        name: Its name; its number where it has none.
        uid: Its number.
        gid: Its own group.
        groups: Further groups.
        home: Its home folder, "/" where it has none.
    """

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    home: str = "/"


def find(user: str, *, passwd: str, group: str) -> Account | None:
    """The user of a name or number; None for a name that is not known or a number out of range.

    A name goes before a number, as everywhere. A number that is not known is a user all the same,
    with a group of the same number.

    Args:
        user: Name or number.
        passwd: Content of /etc/passwd.
        group: Content of /etc/group.
    """
    number = int(user) if user.isascii() and user.isdigit() and len(user) <= 10 else None
    by_number = None
    for fields in _entries(passwd, 7):
        uid, gid = _id(fields[2]), _id(fields[3])
        if uid is None or gid is None:
            continue
        if fields[0] == user:
            return _account(fields, uid, gid, group)
        if uid == number and by_number is None:
            by_number = _account(fields, uid, gid, group)
    if by_number is not None:
        return by_number
    if number is None or number > MAX_ID:
        return None
    return Account(name=user, uid=number, gid=number)


def _account(fields: list[str], uid: int, gid: int, group: str) -> Account:
    groups = {
        number
        for entry in _entries(group, 4)
        if fields[0] in entry[3].split(",") and (number := _id(entry[2])) is not None
    }
    return Account(fields[0], uid, gid, tuple(sorted(groups - {gid})), fields[5] or "/")


def _entries(text: str, size: int) -> Iterator[list[str]]:
    """The lines that have the right number of fields; what else is there is passed over."""
    for line in text.splitlines():
        fields = line.split(":")
        if len(fields) == size and fields[0]:
            yield fields


def _id(text: str) -> int | None:
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        return None
    return int(text) if int(text) <= MAX_ID else None
