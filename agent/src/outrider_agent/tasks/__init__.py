"""Runs what the server asks for: at most once, within limits, and with all its processes ended."""
