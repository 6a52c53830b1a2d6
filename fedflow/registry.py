"""Names in a recipe -> things. Built-ins, entry points of installed packages, and import paths that are allowed here.

A name is either short ("fedavg", "digits") or an import path "package.module:attribute". Which import paths may be
imported is decided where the name is resolved: at a site, by the site's own configuration.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Hashable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from fedflow.errors import ResolveError, field_error

__all__ = ["call", "entry_point_names", "load_entry_point", "resolve"]


def entry_point_names(group: str) -> list[str]:
    """Names that installed packages offer under entry point group `fedflow.<group>`."""
    return sorted({point.name for point in entry_points(group=f"fedflow.{group}")})


def load_entry_point(group: str, name: str, *, field: str, allowed: Iterable[str] | None = None) -> Any | None:
    """The object that an installed package offers as `name`, or None. Raises ResolveError where importing it fails, or where it is
    of no module that is `allowed`."""
    for point in entry_points(group=f"fedflow.{group}", name=name):
        _check_allowed(point.module, name, field, allowed)
        try:
            return point.load()
        except Exception as error:
            raise ResolveError(f"{group} {name!r}: entry point {point.value} failed to import: {error!r}") from error
    return None


def resolve(
    group: str, name: str, *, field: str, aliases: Mapping[str, str] | None = None, allowed: Iterable[str] | None = None
) -> Any:
    """What `name` stands for.

    group:   entry point group without prefix ("workloads", "models")
    aliases: short name -> import path, from the site's own configuration; they are allowed by being there
    allowed: patterns of modules that may be imported ("mypackage.*"), by path or as an entry point; None = any
    Raises ResolveError naming `field`, what was looked for and the fix.
    """
    if aliases and name in aliases:
        return _import(aliases[name], field)  # the site's owner wrote it
    if ":" not in name:
        found = load_entry_point(group, name, field=field, allowed=allowed)
        if found is not None:
            return found
        known = sorted({*(aliases or ()), *entry_point_names(group)})
        raise ResolveError(
            field_error(field, name, f"one of {known} or an import path 'module:attribute'", "correct the name")
        )
    _check_allowed(name.partition(":")[0], name, field, allowed)
    found = _import(name, field)
    _check_allowed(getattr(found, "__module__", "") or "", name, field, allowed)  # not what the module itself imported
    return found


def _check_allowed(module: str, name: str, field: str, allowed: Iterable[str] | None) -> None:
    """Raises ResolveError where `module` is not among the patterns `allowed`; never from Python's own library."""
    if module.partition(".")[0] in sys.stdlib_module_names:
        raise ResolveError(field_error(field, name, "code of an installed package", "name a class or factory of yours"))
    if allowed is not None and not any(fnmatchcase(module, pattern) for pattern in allowed):
        expected = (
            f"a module among {sorted(allowed)}" if allowed else "a short name: this site lets a recipe name no module"
        )
        fix = f"let the site's owner add {module} to allowed_imports"
        raise ResolveError(field_error(field, name, expected, fix))


def _import(path: str, field: str) -> Any:
    module_name, _, attribute = path.partition(":")
    try:
        found: Any = _module(module_name)
    except ModuleNotFoundError as error:
        fix = f"install the package that has {error.name!r}, or put it on the Python path"
        raise ResolveError(field_error(field, path, "an importable module", fix)) from error
    except Exception as error:
        raise ResolveError(field_error(field, path, "a module that imports", f"mend it: {error!r}")) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [n for n in dir(found) if not n.startswith("_") and callable(getattr(found, n))]
            raise ResolveError(field_error(field, path, f"one of {public} in {module_name}", "correct the attribute"))
        found = getattr(found, part)
        if isinstance(found, ModuleType):
            raise ResolveError(
                field_error(field, path, "a class or a function", f"{part} is a module: name it before the colon")
            )
    return found


def _module(name: str) -> ModuleType:
    """The module; asked for twice where CPython 3.11's parser stumbles over two threads that parse (python/cpython#106905)."""
    try:
        return importlib.import_module(name)
    except SystemError:
        return importlib.import_module(name)


_signature = lru_cache(maxsize=64)(inspect.signature)


def call(found: Any, args: Mapping[str, Any], *, field: str, **given: Any) -> Any:
    """`found(**args, **given)`, where `given` is passed only as far as the signature asks for it.

    Raises ResolveError naming `field` where the arguments do not fit. An instance without arguments is taken as it is.
    """
    if not callable(found):
        return found
    signature = _signature(found) if isinstance(found, Hashable) else inspect.signature(found)
    wants = signature.parameters
    extra = {k: v for k, v in given.items() if k in wants and k not in args}
    try:
        return found(**args, **extra)
    except TypeError:
        _check_arguments(found, signature, args, extra, field)
        raise


def _check_arguments(
    found: Any, signature: inspect.Signature, args: Mapping[str, Any], extra: Mapping[str, Any], field: str
) -> None:
    try:
        signature.bind(**args, **extra)
    except TypeError as error:
        raise ResolveError(
            field_error(field, dict(args), f"arguments of {getattr(found, '__name__', found)}{signature}", str(error))
        ) from error
