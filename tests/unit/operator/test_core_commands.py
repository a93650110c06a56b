"""What a spec becomes on the wire, and what this version cannot carry out."""

from typing import Any

import pytest
from outrider_operator.core.commands import run_command
from outrider_operator.core.model import Task, parse_spec, unsupported
from outrider_proto.v1 import agent_pb2 as pb


def command_of(spec: dict[str, Any], attempt: int = 1) -> pb.RunCommand:
    parsed = parse_spec(spec)
    assert unsupported(parsed) is None
    task = Task(
        uid="uid-1", namespace="default", name="task", generation=1, spec=parsed, started=100.0
    )
    return run_command(task, attempt)


def test_a_command_says_what_where_and_as_whom() -> None:
    command = command_of(
        {"run": {"command": ["id"]}, "where": "Host", "user": "nobody", "timeoutSeconds": 7}, 3
    )
    assert (command.id.task_uid, command.id.attempt) == ("uid-1", 3)
    assert list(command.command.argv) == ["id"]
    assert command.host is True
    assert command.user == "nobody"
    assert command.timeout_seconds == 7
    assert command.not_after_unix_nanos == 3700 * 10**9


def test_by_default_it_is_the_agents_container_and_user() -> None:
    command = command_of({"run": {"script": {"source": "true"}}})
    assert (command.host, command.user) == (False, "")
    assert list(command.script.interpreter) == ["/bin/sh", "-eu"]


def test_a_task_for_a_plugin_goes_as_it_is() -> None:
    plugin = {"name": "fim", "dataType": 6001, "data": "scan"}
    found = command_of({"run": {"plugin": plugin}}).plugin
    assert (found.name, found.data_type, found.data) == ("fim", 6001, "scan")


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("Ping", pb.BUILTIN_PING),
        ("Facts", pb.BUILTIN_FACTS),
        ("Restart", pb.BUILTIN_RESTART),
        ("Shutdown", pb.BUILTIN_SHUTDOWN),
    ],
)
def test_every_builtin_has_its_number(name: str, builtin: pb.Builtin.ValueType) -> None:
    assert command_of({"run": {"builtin": name}}).builtin == builtin


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"run": {"builtin": "Explode"}}, "spec.run.builtin"),
        ({"run": {"command": ["id"]}, "where": "Moon"}, "spec.where"),
        (
            {"run": {"plugin": {"name": "fim", "dataType": 1}}, "user": "nobody"},
            "spec.run.plugin",
        ),
        ({"run": {}}, "spec.run"),
    ],
)
def test_what_cannot_be_carried_out_is_named(spec: dict[str, Any], field: str) -> None:
    assert str(unsupported(parse_spec(spec))).startswith(field)
