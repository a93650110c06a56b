"""The Outrider agent: one process on each node that runs tasks and gathers records."""
