"""What holds for all tests: a cluster of their own, and property tests that are no stopwatch.

The cluster's variables are set before anything of `cluster` is imported, which reads them once: the
cluster that tests make is not the one that people look at. Property tests draw new examples at each
run, but the same ones where CI is set (Hypothesis' own profile for it), so that a change is judged
by itself; no example has a deadline, since a busy machine says nothing about the code.
"""

from __future__ import annotations

import os

from hypothesis import settings

os.environ.setdefault("OUTRIDER_CLUSTER_NAME", "outrider-e2e")
os.environ.setdefault("OUTRIDER_CLUSTER_PORT", "17443")

if not os.environ.get("CI"):
    settings.register_profile("outrider", deadline=None)
    settings.load_profile("outrider")
