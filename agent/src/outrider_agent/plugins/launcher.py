"""Becomes a plug-in: the last steps before its program, in the process that is to be it.

Run as a script by the bare interpreter, without the agent's packages: in a process that was only
forked, nothing of this would be safe beside the agent's threads. What to do comes as JSON in a
file that has no name; what went wrong goes to a pipe, which a success closes.
"""

import fcntl
import json
import os
import resource
import signal
import sys

# Above what the plug-in gets: its tasks are on 3, its records go to 4.
_ABOVE = 10


def main() -> None:
    """Become the plug-in of the description whose descriptor is the first argument."""
    status = fcntl.fcntl(int(sys.argv[2]), fcntl.F_DUPFD_CLOEXEC, _ABOVE)
    step = "prepare"
    try:
        with open(int(sys.argv[1]), "rb") as file:  # noqa: PTH123 - a descriptor
            file.seek(0)
            job = json.load(file)
        moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _ABOVE) for fd in job["descriptors"]]
        # What we inherited would stay open in the plug-in, and 3 and 4 may be among it.
        for fd in (int(sys.argv[2]), *job["descriptors"]):
            os.close(fd)
        for place, fd in enumerate(moved):
            os.dup2(fd, 3 + place)  # inherited from here on
        for name in job["cgroups"]:
            step = f"join {name}"
            with open(name, "w") as procs:  # noqa: PTH123 - no further import
                procs.write("0")
        step = "limit itself"
        for number, value in job["limits"]:
            _limit(number, value)
        os.umask(0o077)
        step = f"enter {job['directory']}"
        os.chdir(job["directory"])
        if job["ids"] is not None:
            step = "become its user"
            uid, gid, groups = job["ids"]
            os.setgroups(groups)
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):  # Python's own ways
            signal.signal(number, signal.SIG_DFL)
        step = "start"
        os.execve(job["path"], job["argv"], job["environment"])  # noqa: S606 - as intended
    except OSError as error:
        told = {"step": step, "errno": error.errno or 0, "text": error.strerror or str(error)}
        os.write(status, json.dumps(told).encode())
        os._exit(127)


def _limit(number: int, value: int) -> None:
    """Lower a limit; one that is lower already stays."""
    _, hard = resource.getrlimit(number)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(number, (value, value))


if __name__ == "__main__":
    main()
