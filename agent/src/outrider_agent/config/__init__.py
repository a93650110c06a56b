"""The agent's configuration: checked, put into force as one step, kept on disk, watched."""
