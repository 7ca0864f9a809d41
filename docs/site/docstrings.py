"""What the reader of docstrings does not know by itself."""

from __future__ import annotations

import ast
import re

from griffe import (
    AliasResolutionError,
    Attribute,
    Class,
    Expr,
    ExprCall,
    ExprKeyword,
    ExprName,
    Extension,
    Function,
    Module,
    Object,
    Parameter,
    ParameterKind,
    Parameters,
)

import probescore
import probescore_adapters
import probescore_audit
import probescore_probes
import probescore_server

PACKAGES = (probescore, probescore_server, probescore_probes, probescore_audit, probescore_adapters)

_PUBLIC = {name: f"{package.__name__}.{name}" for package in reversed(PACKAGES) for name in package.__all__}
_PAGE = re.compile(r"`{1,2}(docs/(\S+\.md))`{1,2}")  # seen from a page in reference/api
_NAME = re.compile(r"(?<!`)(`{1,2})(\w+)\1(?!`)")


class Conventions(Extension):
    """What the reference of Python shows otherwise than it is written.

    A class that is made by ``__new__`` is shown with those parameters, a model of pydantic with its fields, an enumeration with its
    values, and a default that has a name as what it is. reStructuredText's ``::`` is taken for what Markdown does without, and a docstring
    that names something public, or a page, links to it.
    """

    def on_class(self, *, cls: Class, **_: object) -> None:
        """Lets ``__new__`` stand for the ``__init__`` that a class does not have, and shows the fields of models and enumerations."""
        bases = {str(base) for base in cls.bases}
        if "__new__" in cls.members and "__init__" not in cls.members:
            cls.set_member("__init__", cls.members["__new__"])
        elif "_ManifestPart" in bases:
            _show_fields(cls)
        elif any("Enum" in base for base in bases) and cls.docstring is not None:
            values = [f"- `{value.name}` = `{value.value}`" for value in _attributes(cls) if value.docstring is None]
            cls.docstring.value += "\n\n" + "\n".join(values)

    def on_object(self, *, obj: Object, **_: object) -> None:
        """Leaves out what says that code follows, since Markdown sees that it is set in, and links names."""

        def link(quoted: re.Match[str]) -> str:
            name = quoted[2]
            return f"[`{name}`][{_PUBLIC[name]}]" if name in _PUBLIC and name not in obj.path.split(".") else quoted[0]

        if obj.docstring is not None:
            text = obj.docstring.value.replace("\n::\n", "\n").replace("::\n\n", ":\n\n")
            obj.docstring.value = _PAGE.sub(r"[`\1`](../../\2)", _NAME.sub(link, text))

    def on_package(self, *, pkg: Module, **_: object) -> None:
        """Puts the values of constants where their names are defaults."""
        _show_defaults(pkg)


def _attributes(cls: Class) -> list[Attribute]:
    return [member for member in cls.members.values() if isinstance(member, Attribute) and not member.name.startswith("_")]


def _show_fields(cls: Class) -> None:
    """Gives a model of pydantic the ``__init__`` that pydantic makes at run time: a keyword for each field."""
    fields = [field for field in _attributes(cls) if "property" not in field.labels]
    parameters = Parameters(Parameter("self", kind=ParameterKind.positional_or_keyword))
    described = []
    for field in fields:
        default, description = _of_field(field.value)
        parameters.add(Parameter(field.name, annotation=field.annotation, kind=ParameterKind.keyword_only, default=default))
        if description:
            described.append(f"    {field.name}: {description}")
    cls.set_member("__init__", Function("__init__", parameters=parameters, parent=cls))
    if described and cls.docstring is not None:
        cls.docstring.value += "\n\nAttributes:\n" + "\n".join(described)


def _of_field(value: str | Expr | None) -> tuple[str | Expr | None, str]:
    """The default and the description of a field that is assigned this."""
    if not isinstance(value, ExprCall) or str(value.function) != "Field":
        return value, ""
    named = {argument.name: argument.value for argument in value.arguments if isinstance(argument, ExprKeyword)}
    default = next((argument for argument in value.arguments if not isinstance(argument, ExprKeyword)), None)
    return default, ast.literal_eval(str(named["description"])) if "description" in named else ""


def _show_defaults(scope: Object) -> None:
    for member in scope.members.values():
        if isinstance(member, Function):
            for parameter in member.parameters:
                if isinstance(parameter.default, ExprName):
                    parameter.default = _value_of(parameter.default, scope)
        elif isinstance(member, Module | Class):
            _show_defaults(member)


def _value_of(name: ExprName, scope: Object) -> str | Expr:
    """What a constant is; its name if it is none of ours."""
    try:
        constant = scope.modules_collection[name.canonical_path]
    except (AliasResolutionError, KeyError):
        return name
    return constant.value or name if constant.is_attribute else name
