"""What the agent keeps on disk: the journal of runs and the outbox of record batches.

One SQLite file, one thread that owns it, one commit for all operations that wait.
"""
