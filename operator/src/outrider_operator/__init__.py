"""Outrider's server: the gateway of the agents in every replica, the leader of the fleet in one."""
