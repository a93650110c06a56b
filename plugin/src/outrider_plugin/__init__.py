"""Write a plug-in: send records, take tasks, answer them.

    from outrider_plugin import Plugin

    with Plugin() as plugin:
        plugin.send(6001, {"path": "/etc/passwd", "event": "changed"})
        for task in plugin:                        # until the agent wants it to end
            plugin.answer(task, {"state": "ok"})

Needs nothing but Python's own library. What it must not do: read standard input, or use the
descriptors 3 and 4 in any other way. What a plug-in prints goes to the agent's log.
"""

from outrider_plugin.plugin import Plugin, PluginClosedError
from outrider_plugin.wire import MESSAGE_BYTES, Task

__all__ = ["MESSAGE_BYTES", "Plugin", "PluginClosedError", "Task"]
