"""Constructor signatures of Equinox modules, which are dataclasses without saying so."""

from collections.abc import Iterator
from typing import Any

from griffe import Attribute, Class, Decorator, ExprCall, ExprName, Extension, Module


class EquinoxFields(Extension):
    """Marks Equinox modules and their fields as dataclasses, for griffe to do the rest."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Called once the package is read, and before dataclasses are."""
        for cls in _classes(pkg):
            if _is_equinox(cls) and "__init__" not in cls.members:
                lines = {"lineno": cls.lineno, "endlineno": cls.lineno}
                cls.decorators.append(Decorator(ExprName("dataclasses.dataclass"), **lines))
                for member in cls.members.values():
                    _translate(member)


def _classes(owner: Any) -> Iterator[Class]:
    for member in owner.members.values():
        if not member.is_alias and (member.is_class or member.is_module):
            if member.is_class:
                yield member
            yield from _classes(member)


def _is_equinox(cls: Class) -> bool:
    for base in cls.bases:
        path = getattr(base, "canonical_path", "")
        if path == "equinox.Module":
            return True
        package, _, inner = path.partition(".")
        if package == cls.package.name and _is_equinox(cls.package[inner]):
            return True
    return False


def _translate(member: Any) -> None:
    value = getattr(member, "value", None)
    if isinstance(member, Attribute) and isinstance(value, ExprCall):
        if value.canonical_path in {"equinox.field", "eqx.field"}:
            value.function = ExprName("dataclasses.field")
