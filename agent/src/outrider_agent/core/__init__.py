"""What the agent decides: pure functions and state machines, fed by the edges.

No input, no output, no clock: now is passed in.
"""
