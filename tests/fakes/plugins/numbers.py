#!/usr/bin/env python3
"""A plug-in that sends numbered records: 1, 2, 3 and on, over restarts and new versions.

The number sent last stands in its working directory, so a number that nobody got was lost on the
way, and one that came twice was sent at the moment of its end. DETAIL: seconds between two, and a
word that all records bear.
"""

import os
import time
from pathlib import Path

from outrider_plugin import Plugin, PluginClosedError

NUMBERED = 6001


def main() -> None:
    """Send until the agent wants it to end."""
    version = os.environ["OUTRIDER_PLUGIN_VERSION"]
    with Path("starts").open("a") as starts:
        starts.write(f"{version} {time.time():.3f}\n")
    last, unfinished = Path("last"), Path("last.new")
    number = int(last.read_text()) if last.exists() else 0
    with Plugin() as plugin:
        seconds, session = plugin.detail.split()
        try:
            while True:
                number += 1
                fields = {"number": str(number), "version": version, "session": session}
                plugin.send(NUMBERED, fields)
                unfinished.write_text(str(number))
                unfinished.replace(last)
                plugin.next_task(float(seconds))
        except PluginClosedError:
            return


if __name__ == "__main__":
    main()
