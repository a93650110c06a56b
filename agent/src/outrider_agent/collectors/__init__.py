"""What the agent gathers by itself: its heart-beat, and the host's metrics."""
