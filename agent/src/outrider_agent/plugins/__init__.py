"""Runs programs beside the agent, as the configuration names them; each harms only itself."""
