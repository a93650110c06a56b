"""The agent's connection to a server: finds one, keeps a stream to it, and never gives up."""
