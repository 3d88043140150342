"""A call as soon as a module has been imported, without importing it."""

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder


class _Calling(Loader):
    """A module's own loader, and a call after it."""

    def __init__(self, loader: Loader, call: Callable[[], None]):
        self.loader, self.call = loader, call

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module) -> None:
        # who asks the module for its source asks its own loader
        module.__loader__ = module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.call()


class _Waiting(MetaPathFinder):
    def __init__(self, name: str, call: Callable[[], None]):
        self.name, self.call = name, call

    def find_spec(self, name, path, target=None):
        if name != self.name:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Calling(spec.loader, self._imported)
        return spec

    def _imported(self) -> None:
        sys.meta_path.remove(self)
        self.call()


def when_imported(name: str, call: Callable[[], None]) -> None:
    """Calls at once where the module has been imported, else right after its import; one that fails may be repeated."""
    if name in sys.modules:
        import_module(name)  # returns when another thread is done with it
        call()
    else:
        sys.meta_path.insert(0, _Waiting(name, call))
