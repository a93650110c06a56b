"""Where programs on the node hand records to the agent."""
