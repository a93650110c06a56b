"""What the commands decide and show, as pure functions: no cluster, no terminal, no clock."""
