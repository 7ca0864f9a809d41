"""What the reader of docstrings does not know by itself."""

from __future__ import annotations

import re

from griffe import AliasResolutionError, Class, Expr, ExprName, Extension, Function, Module, Object

import probescore
import probescore_adapters
import probescore_audit
import probescore_probes
import probescore_server

PACKAGES = (probescore, probescore_server, probescore_probes, probescore_audit, probescore_adapters)

_PUBLIC = {name: f"{package.__name__}.{name}" for package in reversed(PACKAGES) for name in package.__all__}
_NAME = re.compile(r"(?<!`)(`{1,2})(\w+)\1(?!`)")


class Conventions(Extension):
    """What the reference of Python shows otherwise than it is written.

    A class that is made by ``__new__`` is shown with those parameters, an enumeration with its values, and a default that has a name as what it
    is. reStructuredText's ``::`` is taken for what Markdown does without, and a docstring that names something public links to it.
    """

    def on_class(self, *, cls: Class, **_: object) -> None:
        """Lets ``__new__`` stand for the ``__init__`` that a class does not have, and lists what an enumeration has."""
        if "__new__" in cls.members and "__init__" not in cls.members:
            cls.set_member("__init__", cls.members["__new__"])
        if cls.docstring is not None and any("Enum" in str(base) for base in cls.bases):
            values = [member for member in cls.members.values() if member.is_attribute and not member.name.startswith("_")]
            undocumented = [f"- `{value.name}` = `{value.value}`" for value in values if value.docstring is None]
            cls.docstring.value += "\n\n" + "\n".join(undocumented)

    def on_object(self, *, obj: Object, **_: object) -> None:
        """Leaves out what says that code follows, since Markdown sees that it is set in, and links names."""

        def link(quoted: re.Match[str]) -> str:
            name = quoted[2]
            return f"[`{name}`][{_PUBLIC[name]}]" if name in _PUBLIC and name not in obj.path.split(".") else quoted[0]

        if obj.docstring is not None:
            text = obj.docstring.value.replace("\n::\n", "\n").replace("::\n\n", ":\n\n")
            obj.docstring.value = _NAME.sub(link, text)

    def on_package(self, *, pkg: Module, **_: object) -> None:
        """Puts the values of constants where their names are defaults."""
        _show_defaults(pkg)


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
