"""The messages and calls of the proto, with their comments.

What there is comes from the descriptors that the generated code carries, and what it means from the comments in proto/.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, FileDescriptor, OneofDescriptor, ServiceDescriptor

from probescore.v1 import activations_pb2, admin_pb2, probes_pb2, scoring_pb2, tensor_pb2

ROOT = Path(__file__).parents[2]
FILES: tuple[FileDescriptor, ...] = tuple(module.DESCRIPTOR for module in (scoring_pb2, probes_pb2, tensor_pb2, activations_pb2, admin_pb2))

_OPENS = re.compile(r"(?:message|enum|service|oneof) (\w+) \{")
_NAMES = re.compile(r"(?:rpc (\w+)\(|(?:\w[\w.<>, ]* )?(\w+) = \d+)")
_TYPES = {value: name.removeprefix("TYPE_").lower() for name, value in vars(FieldDescriptor).items() if name.startswith("TYPE_")}


def write() -> str:
    """A part for each file: its services first, then its messages and enumerations in the order of the file."""
    return "\n\n".join(_file(file) for file in FILES)


def _file(file: FileDescriptor) -> str:
    comments = dict(_comments((ROOT / "proto" / file.name).read_text(), file.package))
    kinds: list[Descriptor | EnumDescriptor] = [*file.message_types_by_name.values(), *file.enum_types_by_name.values()]
    in_order = sorted(kinds, key=lambda kind: list(comments).index(kind.full_name))
    sections = [_service(service, comments) for service in file.services_by_name.values()]
    for kind in in_order:
        sections.extend(_message(kind, comments) if isinstance(kind, Descriptor) else [_enum(kind, comments)])
    return f"## {file.name.rpartition('/')[2]}\n\n" + "\n\n".join(sections)


def _comments(source: str, package: str) -> Iterator[tuple[str, str]]:
    """The comment before each thing that has a name, by the thing's full name; those of a oneof belong to the message around it."""
    scope, comment = [package], []
    for line in map(str.strip, source.splitlines()):
        if line.startswith("//"):
            comment.append(line.removeprefix("//").strip())
            continue
        if opens := _OPENS.match(line):
            yield ".".join([*scope, opens[1]]), " ".join(comment)
            if not line.endswith("}"):
                scope.append("" if line.startswith("oneof") else opens[1])
        elif line.startswith("}"):
            scope.pop()
        elif names := _NAMES.match(line):
            yield ".".join([*filter(None, scope), names[1] or names[2]]), " ".join(comment)
        comment = []


def _service(service: ServiceDescriptor, comments: dict[str, str]) -> str:
    rows = [
        f"| `{method.name}` | {_link(method.input_type)} | {'stream of ' * method.server_streaming}{_link(method.output_type)} "
        f"| {_cell(comments[method.full_name])} |"
        for method in service.methods
    ]
    head = "| call | request | answer | |\n|---|---|---|---|\n"
    return f"### {service.name}\n\n{comments[service.full_name]}\n\n{head}" + "\n".join(rows)


def _message(message: Descriptor, comments: dict[str, str]) -> Iterator[str]:
    text = f"### {_short(message)}\n\n{comments[message.full_name]}"
    if message.fields:
        rows = [
            f"| `{field.name}`&nbsp;=&nbsp;{field.number} | {_kind(field)} | {_cell(_meaning(field, comments))} |"
            for field in message.fields
        ]
        text += "\n\n| field | type | |\n|---|---|---|\n" + "\n".join(rows)
    yield text
    for nested in message.nested_types:
        if not nested.GetOptions().map_entry:
            yield from _message(nested, comments)
    for enum in message.enum_types:
        yield _enum(enum, comments)


def _enum(enum: EnumDescriptor, comments: dict[str, str]) -> str:
    scope = enum.full_name.rpartition(".")[0]
    # the values of an enumeration are named beside it, not in it; the source has them inside
    rows = [
        f"| `{value.name}`&nbsp;=&nbsp;{value.number} | {_cell(comments[f'{scope}.{enum.name}.{value.name}'])} |" for value in enum.values
    ]
    return f"### {_short(enum)}\n\n{comments[enum.full_name]}\n\n| value | |\n|---|---|\n" + "\n".join(rows)


def _meaning(field: FieldDescriptor, comments: dict[str, str]) -> str:
    text, choice = comments[field.full_name], _choice(field)
    return text if choice is None else f"*One of `{choice.name}`.* {text}"


def _kind(field: FieldDescriptor) -> str:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
        return f"map from {_kind(key)} to {_kind(value)}"
    named = field.message_type or field.enum_type
    kind = _link(named) if named is not None else f"`{_TYPES[field.type]}`"
    if field.is_repeated:
        return f"list of {kind}"
    return f"{kind}, optional" if field.has_presence and named is None and _choice(field) is None else kind


def _choice(field: FieldDescriptor) -> OneofDescriptor | None:
    """The fields of which at most one is there, this one among them; for protobuf an optional field is such a choice of its own."""
    oneof = field.containing_oneof
    return oneof if oneof is not None and len(oneof.fields) > 1 else None


def _short(named: Descriptor | EnumDescriptor) -> str:
    return named.full_name.removeprefix(f"{named.file.package}.")


def _link(named: Descriptor | EnumDescriptor) -> str:
    if named.file not in FILES:
        return f"`{named.full_name}`"
    return f"[{_short(named)}](#{_short(named).lower().replace('.', '')})"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")
