"""
Lazy imports for workers: what libraries import at their start, and a worker does not use, loads on first use.

A worker starts for each run, and most of its start is imports. After `install`, importing a module of `LAZY`
takes no time. The real module is loaded when an attribute is read that the lazy one does not have; until then
the submodules of a package can be imported without its `__init__`. Each name that `LAZY` lists for a module
can be imported without loading it. It is then an object that loads the real one when it is called,
subclassed, subscripted, read from, or used in `issubclass`. Anything else that is done with it is an error.

Importing a module of `ABSENT`, without which everything that imports it works, is an `ImportError`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from importlib.machinery import ModuleSpec

ABSENT = (
    "OpenSSL",  # no TLS
    "ssl",
    "_hashlib",  # OpenSSL's digests: Python has its own
    "bz2",  # formats of shutil
    "lzma",
    "h2",  # no HTTP/2
)

LAZY: Mapping[str, str] = {
    # of Python
    "asyncio": "AbstractEventLoop Future iscoroutine=coroutines",
    "base64": "",
    "calendar": "",
    "difflib": "",
    "email.message": "EmailMessage Message",
    "email.utils": "",
    "gettext": "gettext ngettext",
    "html": "escape",
    "http.cookiejar": "",
    "logging": "-StreamHandler",
    "mimetypes": "",
    "pickle": "",
    "pkgutil": "",
    "pprint": "pformat",
    "pty": "",
    "random": "",
    "tempfile": "",
    # of Twisted
    "twisted.cred.credentials": "IUsernameDigestHash",
    "twisted.internet.stdio": "PipeAddress StandardIO",
    "twisted.internet.udp": "",
    "twisted.internet.unix": "",
    "twisted.logger._json": "eventAsJSON eventFromJSON eventsFromJSONLogFile jsonFileLogObserver",
    "twisted.logger._stdlib": "STDLibLogObserver StringifiableFromEvent fromStdlibLogLevelMapping",
    "twisted.persisted.sob": "",
    "twisted.python.filepath": "FilePath _asFilesystemBytes _coerceToFilesystemEncoding",
    "twisted.python.modules": "getModule",
    "twisted.python.threadpool": "ThreadPool",
    "twisted.spread.pb": "-Copyable ViewPoint",
    "twisted.web.template": "Tag renderElement",
    "twisted.web.util": "",
    # of Klein, and of what it imports
    "hyperlink": "DecodedURL",
    "klein": "Klein=_app",
    "klein._dihttp": "RequestComponent RequestURL Response",
    "uuid": "UUID",
    "werkzeug": "",
    "werkzeug.datastructures": (
        "Headers ImmutableDict=structures MultiDict=structures iter_multi_items=structures"
    ),
    "werkzeug.http": "",
    "werkzeug.urls": "_urlencode",
    "werkzeug.security": "_windows_device_files safe_join",
    "werkzeug.wsgi": "get_host wrap_file",
}
"""
The lazy modules and the names that are imported from each. `name=submodule` is imported from the submodule,
which is loaded. `-name` is left out of the base classes of a class: Twisted's requests inherit the part of
Perspective Broker that would send them to another process, and werkzeug's development server has a handler of
logs. What they inherit does not exist then.
"""


def install() -> None:
    """Make the imports of this process lazy. Call this before any other import of the modules."""
    for name in ABSENT:
        sys.modules[name] = None  # type: ignore[assignment]
    sys.meta_path.insert(0, _LazyFinder)


def loaded() -> list[str]:
    """Return those modules of `LAZY` that have been loaded."""
    return [name for name in LAZY if not isinstance(sys.modules.get(name, _UNUSED), _LazyModule)]


class _LazyFinder:
    """Finds the modules of `LAZY` as Python would, but does not execute them."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a lazy module, or None for other modules (see `importlib.abc`)."""
        spec = PathFinder.find_spec(name, path, target) if name in LAZY else None
        if spec is not None:
            spec.loader = _LazyLoader(spec.loader)  # type: ignore[assignment]  # it need not be a subclass
        return spec


class _LazyLoader:
    def __init__(self, real: Any) -> None:
        self.real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _LazyModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing yet."""


class _LazyModule(ModuleType):
    """A module that is not loaded; it becomes an ordinary one."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":  # Python itself asks for those, which may not exist
            raise AttributeError(f"the lazy module {self.__name__!r} has no {name!r}")
        value = self._get(name)
        if isinstance(self, _LazyModule):
            setattr(self, name, value)
        return value

    def _get(self, name: str) -> Any:
        for listed, submodule in _names(self.__name__):
            if listed.removeprefix("-") == name:
                real = import_module(f"{self.__name__}.{submodule}") if submodule else None
                return getattr(real, name) if real else _LazyName(self, listed)
        path: Sequence[str] = vars(self).get("__path__", ())
        if path and PathFinder.find_spec(f"{self.__name__}.{name}", path) is not None:
            return import_module(f"{self.__name__}.{name}")
        return getattr(_load(self), name)


_UNUSED = _LazyModule("unused")


def _names(module: str) -> Iterator[tuple[str, str]]:
    for entry in LAZY[module].split():
        name, _, submodule = entry.partition("=")
        yield name, submodule


def _load(module: ModuleType) -> ModuleType:
    """Load a module, if it is still lazy, and return it."""
    if isinstance(module, _LazyModule):
        for name, _ in _names(module.__name__):
            vars(module).pop(name.removeprefix("-"), None)
        module.__class__ = ModuleType  # type: ignore[assignment]  # as importlib.util.LazyLoader does
        spec = module.__spec__
        assert spec is not None  # noqa: S101 - found with one
        assert isinstance(spec.loader, _LazyLoader)  # noqa: S101
        spec.loader = module.__loader__ = spec.loader.real
        spec.loader.exec_module(module)
    return module


class _LazyName:
    """What can be imported from a lazy module without loading it."""

    def __init__(self, module: _LazyModule, listed: str) -> None:
        self._module = module
        self._name = listed.removeprefix("-")
        self._is_base = self._name == listed

    def _load(self) -> Any:
        return getattr(_load(self._module), self._name)

    __contains__ = __iter__ = None  # else Python would use __getitem__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # such as those that `inspect` looks for
            raise AttributeError(f"{self._name} of the lazy module {self._module.__name__!r} has no {name!r}")
        return getattr(self._load(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._load()(*args, **kwargs)

    def __getitem__(self, item: Any) -> Any:
        return self._load()[item]

    def __mro_entries__(self, _: tuple[Any, ...]) -> tuple[type, ...]:
        return (self._load(),) if self._is_base else ()

    def __instancecheck__(self, value: object) -> bool:
        # Before a class is loaded, it has no instances.
        return not isinstance(self._module, _LazyModule) and isinstance(value, self._load())

    def __subclasscheck__(self, kind: type) -> bool:
        return issubclass(kind, self._load())
