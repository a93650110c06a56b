"""What holds for all tests: the cluster they make is not the one that people look at.

Set before anything of `cluster` is imported, which reads it once.
"""

from __future__ import annotations

import os

os.environ.setdefault("OUTRIDER_CLUSTER_NAME", "outrider-e2e")
os.environ.setdefault("OUTRIDER_CLUSTER_PORT", "17443")
