"""What the builtin Facts prints: the node as one JSON object, for people and for scripts."""

import json
import os
import time

from outrider_agent.collectors import hostinfo
from outrider_agent.collectors.hostinfo import HostPaths


def facts(paths: HostPaths, *, node: str, version: str, config: str) -> bytes:
    """The facts, as indented JSON with a line feed at its end. Blocks: use a thread.

    Args:
        paths: Where the host's file systems are.
        node: Name of the node.
        version: The agent's.
        config: Hash of the configuration in force, empty for none.
    """
    addresses = hostinfo.addresses()
    found = {
        "node": node,
        "agent_version": version,
        "config_hash": config,
        "uptime_seconds": int(time.time() - hostinfo.boot_time(paths.proc)),
        "load": [round(load, 2) for load in os.getloadavg()],
        "memory_available_bytes": hostinfo.memory(paths.proc)[1],
        "ipv4": addresses.intranet_ipv4 + addresses.extranet_ipv4,
        "ipv6": addresses.intranet_ipv6 + addresses.extranet_ipv6,
        **hostinfo.static_fields(paths),
        **hostinfo.changing_fields(paths),
    }
    return (json.dumps(found, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()
