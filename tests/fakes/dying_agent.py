"""The real agent, which kills itself at one point of putting one configuration into force.

python dying_agent.py POINT HASH FLAGS...
"""

import os
import signal
import sys
from typing import Any

from outrider_agent import main
from outrider_agent.config.applier import Applier
from outrider_agent.config.lastgood import LastGood
from outrider_agent.configuring import AgentPart

#: In the order in which they come.
POINTS = ("prepare", "written", "switch", "switched", "renamed", "kept", "applied")


def die_at(point: str, wanted: str) -> None:
    """Have the agent end as by kill -9 at a point, for the configuration of that hash."""
    trying = [""]

    def here(name: str) -> None:
        if name == point and trying[0] == wanted:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(owner: type, name: str, before: str, after: str, *, wait: bool) -> None:
        real = getattr(owner, name)

        async def waiting(self: Any, *given: Any) -> Any:
            here(before)
            found = await real(self, *given)
            here(after)
            return found

        def plain(self: Any, *given: Any) -> Any:
            here(before)
            found = real(self, *given)
            here(after)
            return found

        setattr(owner, name, waiting if wait else plain)

    real_try = Applier._try

    async def noted(self: Applier, config: Any) -> bool:
        trying[0] = config.hash
        return await real_try(self, config)

    Applier._try = noted  # type: ignore[method-assign] # that is what it is for
    around(LastGood, "prepare", "prepare", "written", wait=False)
    around(AgentPart, "put", "switch", "switched", wait=True)
    around(LastGood, "_sync_folder", "renamed", "kept", wait=False)
    around(Applier, "_look", "applied", "", wait=True)


if __name__ == "__main__":
    die_at(sys.argv[1], sys.argv[2])
    sys.exit(main.main(sys.argv[3:]))
