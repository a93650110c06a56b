"""The edge to the Kubernetes API server. Decides nothing about tasks: that is in core."""
