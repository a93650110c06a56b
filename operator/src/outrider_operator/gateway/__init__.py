"""The edge where agents and leaders connect: TLS, authentication, streams. Plans nothing."""
