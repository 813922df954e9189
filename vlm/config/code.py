"""A user's code in configs: import paths, which keep a config plain JSON, and hashes of its source.

A field that takes code accepts the object itself, or its import path: `my_parts:my_loss`. An object
that is made with arguments is a call with literal values: `my_parts:Chart(every=10)`.
"""

import ast
import dataclasses
import functools
import hashlib
import importlib
import inspect
import os
import re
import sys
import textwrap
import types
from collections.abc import Iterator, Sized
from typing import TYPE_CHECKING, Any, NewType

from vlm.errors import ConfigError, brief

# Type of the fields that take code. They hold a `Code`; a type checker lets users pass any object.
if TYPE_CHECKING:
    ImportPath = Any
    DataSource = Any  # a `str`: what names a source, or a `SourceCode`
else:
    ImportPath = NewType("ImportPath", str)
    DataSource = NewType("DataSource", str)

JAX_NN = "jax.nn:"  # import paths that models may have: functions of arrays alone
_PATH = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_][\w.]*)(\(.*\))?", re.DOTALL)
_GIVEN = "<{}>"  # text of an object that has no import path
_MAX_ITEMS = 1000  # of an argument in an import path


class Code(str):
    """Import path of an object, with the object if it is known.

    Example:
        >>> from vlm.config import Code
        >>> Code.of("jax.nn:silu").load()(0.0)
        Array(0., dtype=float32, weak_type=True)
    """

    __slots__ = ("_object",)

    @classmethod
    def of(cls, value: Any, where: str = "the object") -> "Code":
        """Make a reference from an import path or from any object.

        An object without an import path, such as a lambda or what a notebook defines, works in this
        process only: a run with it is resumed by passing it again.

        Raises:
            ConfigError: a text that is no import path.
        """
        if isinstance(value, Code):
            return value
        if isinstance(value, str):
            return cls(_canonical(value, where))
        plain = isinstance(value, dict | list | tuple | int | float) and not hasattr(
            value, "_fields"
        )
        if value is None or plain:
            raise ConfigError(f"{where} is {brief(value)}: give an object, or its import path")
        made = cls(_import_path(value) or _GIVEN.format(_describe(value)))
        made._object = value
        return made

    @property
    def importable(self) -> bool:
        """Whether another process can load the object."""
        return not self.path.startswith("<")

    @property
    def is_known(self) -> bool:
        """Whether the object is there, without an import."""
        return hasattr(self, "_object")

    @property
    def path(self) -> str:
        """The import path as text."""
        return str(self)

    @property
    def name(self) -> str:
        """Short name of the object for logs, such as my_loss."""
        text = self.path.strip("<>") if not self.importable else self.path.partition(":")[2]
        return text.partition("(")[0].rpartition(".")[2] or text

    def load(self, where: str = "the config") -> Any:
        """Return the object: a function with arguments becomes a partial, a class an instance.

        Raises:
            ConfigError: it cannot be imported, or its class does not take the arguments.
        """
        if not hasattr(self, "_object"):
            self._object = _load(self.path, where)
        return self._object

    def if_imported(self) -> Any:
        """Return the object if its module is imported already, without running code; else None.

        An object without an import path is looked up by its name in `__main__`.
        """
        if not hasattr(self, "_object"):
            name = self.strip("<>") if not self.importable else self.partition(":")[2]
            module = "__main__" if not self.importable else self.partition(":")[0]
            found: Any = sys.modules.get(module)
            for part in name.split("."):
                found = vars(found).get(part) if hasattr(found, "__dict__") else None
            if found is None:
                return None
            self._object = found
        return self._object

    def source_hash(self) -> str:
        """Return a hash of the source of the object, and of what it uses in its own module.

        Comments and layout do not count. Empty if a change could not be told, as for compiled code,
        or for a function that was made by another one.
        """
        if not self.importable:
            return _own_hash(getattr(self, "_object", None))
        value = self.load()
        module, name = self.path.partition("(")[0].split(":")
        found = _hash_of_names(_definitions(sys.modules.get(module)), name.partition(".")[0])
        return found or _own_hash(value)  # the module may have imported it

    def __reduce__(self):
        return (type(self), (str(self),))  # a process imports the object itself


class SourceCode(Code):
    """A data set, or a function that makes one, in `data.source`: `python:` and its import path.

    Attributes:
        opened: what the function has made, by its arguments.

    Example:
        >>> vlm.DataConfig(source=[{"image": "cat.jpg", "caption": "a cat"}]).source
        'python:<a list>'
    """

    __slots__ = ("opened",)

    PREFIX = "python:"

    def __new__(cls, text: str):
        made = super().__new__(cls, text)
        made.opened = {}
        return made

    @classmethod
    def of(cls, value: Any, where: str = "the object") -> Any:
        """Make a reference from any object, or from a text with the prefix; keep other texts.

        Raises:
            ConfigError: neither a text nor an object that could be a data set.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        if isinstance(value, str) and not isinstance(value, Code):
            if not value.startswith(cls.PREFIX):
                return value
            path, example = value.removeprefix(cls.PREFIX), "my_parts:my_data or my_parts:make(n=8)"
            return cls(cls.PREFIX + _canonical(path.strip(), where, example))
        if value is None or isinstance(value, bytes | bool | int | float | complex):
            raise ConfigError(
                f"{where} is {brief(value)}: give the name of a source as a str, or a data set"
            )
        if isinstance(value, Code):
            made = cls(cls.PREFIX + value.path)
            if not hasattr(value, "_object"):
                return made
            value = value._object
        else:
            path = _import_path(value) or _GIVEN.format(_describe(value))
            made = cls(cls.PREFIX + path)
        made._object = value
        return made

    @property
    def path(self) -> str:
        """The import path, without the prefix."""
        return str(self).removeprefix(self.PREFIX)


def find_codes(value: Any, where: str = "") -> Iterator[tuple[str, Code]]:
    """Yield all references to code in a config, with the dotted names of their fields."""
    if isinstance(value, Code):
        yield where, value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            inner = f"{where}.{field.name}" if where else field.name
            yield from find_codes(getattr(value, field.name), inner)
    elif isinstance(value, tuple):
        for item in value:
            yield from find_codes(item, where)


def _canonical(
    text: str, where: str, example: str = "my_parts:my_loss or my_parts:MyClass(width=8)"
) -> str:
    """Write an import path with a colon: `my_parts.my_loss` is accepted too."""
    if text.startswith("<"):  # of the config of a run
        return text
    head, call, arguments = text.partition("(")
    if ":" not in head and "." in head:
        module, _, name = head.rpartition(".")
        text = f"{module}:{name}{call}{arguments}"
    match = _PATH.fullmatch(text)
    if match is None or (match[3] and _arguments(match[3]) is None):
        raise ConfigError(
            f"{where} is {brief(text)}: give an object, or its import path such as {example}"
        )
    return text


def _arguments(call: str) -> dict[str, Any] | None:
    """Parse `(a=1, b="x")`; None if it is something else."""
    try:
        node = ast.parse(f"f{call}", mode="eval").body
        if not isinstance(node, ast.Call) or node.args or any(k.arg is None for k in node.keywords):
            return None
        return {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _target(path: str, where: str) -> Any:
    """Import the function or class that a path names, without its arguments."""
    match = _PATH.fullmatch(path)
    assert match is not None
    module, name = match[1], match[2]
    found = import_module(module, f"{where} names {path!r}")
    try:
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError:
        raise ConfigError(
            f"{where} names {path!r}, and module {module} has no {name!r}: check its spelling"
        ) from None
    return found


def import_module(name: str, reason: str) -> types.ModuleType:
    """Import a module, also from the working directory, where `vlm` itself does not look.

    Raises:
        ConfigError: there is no such module, or it fails; the message begins with `reason`.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{reason}, and there is no module {error.name!r}: run from the folder that has "
            f"{name.replace('.', '/')}.py, or add that folder to PYTHONPATH"
        ) from None
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{reason}, and importing {name} failed with {type(error).__name__}: {error}"
        ) from error


def _load(path: str, where: str) -> Any:
    if path.startswith("<"):
        raise ConfigError(
            f"{where} was {path}, which has no import path: pass it again, as to vlm.train, or put "
            "it into a module"
        )
    target, call = _target(path, where), (_PATH.fullmatch(path) or [""] * 4)[3]
    if not call:
        return target
    arguments = _arguments(call) or {}
    if not isinstance(target, type):
        return functools.partial(target, **arguments)
    try:
        return target(**arguments)
    except TypeError as error:
        raise ConfigError(f"{where} is {path}, which is refused: {error}") from None


def _import_path(value: Any) -> str | None:
    """Return the path by which another process can import an equal object, if there is one."""
    if isinstance(value, functools.partial) and not value.args:
        return _with_arguments(value.func, value.keywords)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f for f in dataclasses.fields(value) if f.init]
        changed = {f.name: getattr(value, f.name) for f in fields if not _is_default(value, f)}
        return _with_arguments(type(value), changed)
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or module == "__main__":
        return None
    if "._" in f".{module}" or module.startswith("vlm."):  # a library's private module
        module = _public_module(value, module.partition(".")[0], name) or module
    found = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return f"{module}:{name}" if found is value else None


def _public_module(value: Any, package: str, name: str) -> str | None:
    """Return the shortest name of a public module of `package` that has `value` as `name`."""
    public = (m for m in sys.modules if m.partition(".")[0] == package and "._" not in f".{m}")
    found = (m for m in public if getattr(sys.modules[m], name, None) is value)
    return min(found, default=None, key=len)


def _with_arguments(target: Any, arguments: dict[str, Any]) -> str | None:
    path = _import_path(target)
    if any(isinstance(x, Sized) and len(x) > _MAX_ITEMS for x in arguments.values()):
        return None  # data, which does not belong into a config
    call = f"({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"
    return None if path is None or _arguments(call) != arguments else path + call


def _is_default(value: Any, field: dataclasses.Field) -> bool:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    return default is not dataclasses.MISSING and getattr(value, field.name) == default


def _describe(value: Any) -> str:
    name = getattr(value, "__qualname__", None)
    return name.replace("<", "").replace(">", "") if name else f"a {type(value).__name__}"


def _own_hash(value: Any) -> str:
    """Hash a function or class without an import path, such as one of a notebook."""
    name = getattr(value, "__qualname__", "")
    if "<" in name or getattr(value, "__closure__", None):  # a lambda, or it was made by another
        return ""
    module = sys.modules.get(getattr(value, "__module__", None) or "")
    places = (_definitions(place) for place in (module, value))
    return next((found for d in places if (found := _hash_of_names(d, name.partition(".")[0]))), "")


def _hash_of_names(defined: dict[str, list[ast.stmt]], start: str) -> str:
    """Hash the definitions of a name and, recursively, those of the names in them."""
    if start not in defined:
        return ""
    seen, waiting = {}, [start]
    while waiting:
        name = waiting.pop()
        if name in seen or name not in defined:
            continue
        seen[name] = "\n".join(ast.unparse(statement) for statement in defined[name])
        used = (n for statement in defined[name] for n in ast.walk(statement))
        waiting += [node.id for node in used if isinstance(node, ast.Name)]
    text = "\n".join(f"{name}: {seen[name]}" for name in sorted(seen))
    return hashlib.sha256(text.encode()).hexdigest()


def _definitions(place: Any) -> dict[str, list[ast.stmt]]:
    """Return the statements of a module, function or class by the names that they define."""
    found: dict[str, list[ast.stmt]] = {}
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(place)))
    except (OSError, TypeError, SyntaxError):
        return found
    for statement in tree.body:
        for name in _names_defined(statement):
            found.setdefault(name, []).append(statement)
    return found


def _names_defined(statement: ast.stmt) -> list[str]:
    """Return the names that a statement of a module defines; not those that it imports."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
        return [statement.name]
    if isinstance(statement, ast.If | ast.Try | ast.With | ast.For | ast.While):
        inner = (child for child in ast.iter_child_nodes(statement) if isinstance(child, ast.stmt))
        return [name for child in inner for name in _names_defined(child)]
    targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
    return [n.id for t in targets if t for n in ast.walk(t) if isinstance(n, ast.Name)]
