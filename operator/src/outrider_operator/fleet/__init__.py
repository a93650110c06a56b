"""The leader's part: links to all gateways, and the controller that carries tasks out.

Decisions are in core; the API server is reached through core.ports only.
"""
