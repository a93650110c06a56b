"""The commands a task sends: protobuf made from its spec. Sends nothing."""

from outrider_proto.v1.agent_pb2 import (
    Builtin,
    Exec,
    PluginTask,
    RunCommand,
    RunId,
    Script,
)

from outrider_operator.core.model import Task

BUILTINS = {
    "Ping": Builtin.BUILTIN_PING,
    "Facts": Builtin.BUILTIN_FACTS,
    "Restart": Builtin.BUILTIN_RESTART,
    "Shutdown": Builtin.BUILTIN_SHUTDOWN,
}


def run_id(task_uid: str, attempt: int) -> RunId:
    """The name of an attempt."""
    return RunId(task_uid=task_uid, attempt=attempt)


def run_command(task: Task, attempt: int) -> RunCommand:
    """The command for one attempt of a task that has started.

    It may not begin after the task's deadline: a command that was held up somewhere must not run
    when nobody waits for it any more.
    """
    assert task.started is not None
    spec = task.spec
    command = RunCommand(
        id=run_id(task.uid, attempt),
        namespace=task.namespace,
        name=task.name,
        env=spec.env,
        timeout_seconds=spec.timeout_seconds,
        preview_bytes=spec.output.preview_bytes,
        max_output_bytes=spec.output.max_bytes,
        not_after_unix_nanos=int((task.started + spec.active_deadline_seconds) * 1e9),
        host=spec.where == "Host",
        user=spec.user,
    )
    if spec.run.command is not None:
        command.command.CopyFrom(Exec(argv=spec.run.command))
    elif spec.run.script is not None:
        script = Script(interpreter=spec.run.script.interpreter, source=spec.run.script.source)
        command.script.CopyFrom(script)
    elif spec.run.plugin is not None:
        plugin = spec.run.plugin
        command.plugin.CopyFrom(
            PluginTask(name=plugin.name, data_type=plugin.data_type, data=plugin.data)
        )
    else:
        command.builtin = BUILTINS[spec.run.builtin or ""]
    return command
