"""Settings from a YAML file, the environment and flags, in this order, into one typed schema.

A program states its schema once, as nested `Section` classes with a default, a constraint and a
description at each field; file keys, variable names, flags and the help text all follow from it.
Knows no setting of any program. Wrong settings raise `SettingsError`, one line that names the
setting and what was expected; programs end with exit code 2 on it.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import msgspec
import yaml

T = TypeVar("T")

#: Prefix of the environment variables.
ENVIRONMENT_PREFIX = "OUTRIDER_"
#: A settings file is small; more than this is a mistake.
MAX_FILE_BYTES = 1024 * 1024


class SettingsError(Exception):
    """A setting that cannot be used; the text is one line and names the setting."""


class Section(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"
):
    """Base of every group of settings: immutable, keys in camelCase, unknown keys refused."""


@dataclass(frozen=True)
class Leaf:
    """One setting of a schema."""

    #: Names from the root, as in the file: ("sink", "kafka", "bootstrapServers").
    path: tuple[str, ...]
    type: msgspec.inspect.Type
    description: str
    default: Any

    @property
    def name(self) -> str:
        """The setting's name as people write it: "sink.kafka.bootstrapServers"."""
        return ".".join(self.path)

    @property
    def variable(self) -> str:
        """Name of its environment variable."""
        return ENVIRONMENT_PREFIX + "_".join(_words(p, "_") for p in self.path).upper()

    @property
    def flag(self) -> str:
        """Its flag, without the leading dashes."""
        return ".".join(_words(p, "-") for p in self.path)


def _words(name: str, separator: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", separator, name).lower()


def leaves(schema: type[Any]) -> list[Leaf]:
    """All settings of a schema, in its order."""
    return list(_leaves(schema, ()))


def _leaves(schema: type[Any], path: tuple[str, ...]) -> Iterator[Leaf]:
    info = msgspec.inspect.type_info(schema)
    assert isinstance(info, msgspec.inspect.StructType)
    defaults = schema()
    for field in info.fields:
        kind, description = field.type, ""
        if isinstance(kind, msgspec.inspect.Metadata):
            description = str((kind.extra_json_schema or {}).get("description", ""))
            kind = kind.type
        here = (*path, field.encode_name)
        if isinstance(kind, msgspec.inspect.StructType):
            yield from _leaves(kind.cls, here)
        else:
            yield Leaf(here, kind, description, getattr(defaults, field.name))


def load(
    schema: type[T],
    *,
    program: str,
    version: str,
    argv: Sequence[str],
    environ: Mapping[str, str],
) -> T:
    """Read the settings of a program.

    Args:
        schema: The root `Section`.
        program: Name of the program, for its help text.
        version: What --version prints after the name.
        argv: Arguments without the program's name.
        environ: Environment variables.

    Raises:
        SettingsError: A setting cannot be used.
        SystemExit: After --help, --version and --print-config (0), and for unknown flags (2).
    """
    settings = leaves(schema)
    arguments = _parse(settings, program, version, argv)
    config = arguments.pop("config") or environ.get(ENVIRONMENT_PREFIX + "CONFIG")
    print_config = arguments.pop("print_config")
    tree = _read_file(config) if config else {}
    for leaf in settings:
        if leaf.variable in environ:
            _put(tree, leaf, environ[leaf.variable], f"environment variable {leaf.variable}")
    for leaf in settings:
        if leaf.flag in arguments:
            _put(tree, leaf, arguments[leaf.flag], f"flag --{leaf.flag}")
    try:
        loaded = msgspec.convert(tree, schema, strict=False)
    except msgspec.ValidationError as error:
        raise SettingsError(_explain(error, config)) from None
    if print_config:
        plain = msgspec.to_builtins(loaded)
        sys.stdout.write(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
        raise SystemExit(0)
    return loaded


def _parse(settings: list[Leaf], program: str, version: str, argv: Sequence[str]) -> dict[str, Any]:
    parser = _Parser(
        prog=program,
        allow_abbrev=False,
        epilog="Each setting can be given in the file, as an environment variable or as a flag; "
        "the later of these wins.",
    )
    parser.add_argument("--version", action="version", version=f"{program} {version}")
    parser.add_argument("--config", metavar="FILE", help="settings file (YAML)")
    parser.add_argument(
        "--print-config", action="store_true", help="print the settings in force as YAML and exit"
    )
    for leaf in settings:
        default = json.dumps(msgspec.to_builtins(leaf.default))
        text = f"{leaf.description} Default {default}. [${leaf.variable}]"
        parser.add_argument(
            f"--{leaf.flag}",
            dest=leaf.flag,
            metavar="VALUE",
            default=argparse.SUPPRESS,
            help=text.replace("%", "%%"),
        )
    return vars(parser.parse_args(argv))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message}; see {self.prog} --help")


def _read_file(name: str) -> dict[str, Any]:
    path = Path(name)
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
        if len(text) > MAX_FILE_BYTES:
            raise SettingsError(f"settings file {name}: larger than {MAX_FILE_BYTES} bytes")
        tree = yaml.safe_load(text)
    except OSError as error:
        raise SettingsError(f"settings file {name}: cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        line = " ".join(str(error).split())
        raise SettingsError(f"settings file {name}: is not YAML: {line}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise SettingsError(f"settings file {name}: expected a mapping of settings")
    return tree


def _put(tree: dict[str, Any], leaf: Leaf, text: str, origin: str) -> None:
    node = tree
    for part in leaf.path[:-1]:
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise SettingsError(f'setting "{leaf.name}": "{part}" is not a group of settings')
        node = child
    node[leaf.path[-1]] = _from_text(leaf, text, origin)


def _from_text(leaf: Leaf, text: str, origin: str) -> Any:
    if isinstance(leaf.type, msgspec.inspect.CollectionType):
        return [part.strip() for part in text.split(",") if part.strip()]
    if isinstance(leaf.type, msgspec.inspect.DictType):
        try:
            return json.loads(text)
        except ValueError:
            raise SettingsError(
                f'setting "{leaf.name}": expected a JSON object in {origin}'
            ) from None
    return text


def _explain(error: msgspec.ValidationError, config: str | None) -> str:
    """Turn "Expected `int` >= 1 - at `$.a.b`" into a line that names the setting."""
    text = str(error)
    match = re.search(r" - at `\$\.?(.*?)`$", text)
    what, path = (text[: match.start()], match[1]) if match else (text, "")
    unknown = re.search(r"unknown field `(.+?)`", what)
    if unknown:
        name = f"{path}.{unknown[1]}" if path else unknown[1]
        return f'setting "{name}": unknown' + (f" (in {config})" if config else "")
    return f'setting "{path}": {what[0].lower()}{what[1:].replace("`", "")}'


def address(text: str, *, setting: str) -> tuple[str, int]:
    """Take "host:port", ":port" (all interfaces) or "[::1]:port" apart.

    Raises:
        SettingsError: It is none of these.
    """
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.%a-z]+)\]|([^\[\]:\s]*)):(\d{1,5})", text)
    if not match or int(match[3]) > 65535:
        raise SettingsError(
            f'setting "{setting}": expected an address such as ":8080" or "127.0.0.1:8080", '
            f"got {text!r}"
        )
    return match[1] or match[2] or "", int(match[3])


def readable(path: str, *, setting: str, limit: int = MAX_FILE_BYTES) -> bytes:
    """Content of a small file that a setting names.

    Raises:
        SettingsError: It cannot be read, or is larger than `limit` bytes.
    """
    try:
        with open(os.fspath(path), "rb") as file:  # noqa: PTH123 - plain open, the path is a str
            content = file.read(limit + 1)
    except OSError as error:
        raise SettingsError(
            f'setting "{setting}": {path!r} cannot be read: {error.strerror}'
        ) from None
    if len(content) > limit:
        raise SettingsError(f'setting "{setting}": {path!r} is larger than {limit} bytes')
    return content
