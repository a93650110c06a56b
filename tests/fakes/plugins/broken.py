#!/usr/bin/env python3
"""A plug-in that cannot start: it leaves a line behind and ends."""

import os
import sys
from pathlib import Path

with Path("starts").open("a") as starts:
    starts.write(f"{os.environ['OUTRIDER_PLUGIN_VERSION']} broken\n")
sys.exit("this version cannot start here")
