"""A name is a file: plans, families, selectors and data sets are found by listing a folder, or by an entry point.

To add one without changing vitos, write a module in any package and name it in an entry point group, `vitos.plans`,
`vitos.backbones`, `vitos.selectors` or `vitos.datasets`:

    [project.entry-points."vitos.plans"]
    mine = "my_package.mine"

Listing imports nothing. No other place holds a list of names.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

SOURCE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Registry:
    """The modules of one folder of the package, and those of an entry point group.

    >>> "gather" in PLANS.names(), PLANS.module("gather").__name__
    (True, 'vitos.policy.plans.gather')

    Attributes:
        package: dotted name of the folder's package, below `vitos`.
        group: name of the entry point group.
        helpers: modules of the folder that are not entries.
    """

    package: str
    group: str
    helpers: Collection[str] = ()

    def names(self) -> tuple[str, ...]:
        """All names in alphabetical order; nothing is imported.

        Raises:
            ValueError: if an entry point has a name that is already taken.
        """
        folder = SOURCE.joinpath(*self.package.split(".")[1:])
        own = {module.name for module in pkgutil.iter_modules([str(folder)])} - set(self.helpers)
        added = [point.name for point in self._points()]
        if taken := [name for name in added if name in own or added.count(name) > 1]:
            raise ValueError(f"the entry point {taken[0]!r} of {self.group} has a name that is taken; rename it")
        return tuple(sorted([*own, *added]))

    def module(self, name: str) -> ModuleType:
        """Import the module of a name.

        Raises:
            ValueError: if there is no such name; the message lists the known ones.
        """
        for point in self._points():
            if point.name == name:
                return importlib.import_module(point.module)
        if name not in self.names():
            raise ValueError(f"{name!r} is none of {', '.join(self.names())}")
        return importlib.import_module(f"{self.package}.{name}")

    def modules(self) -> Iterator[tuple[str, ModuleType]]:
        """Import all of them, by name."""
        for name in self.names():
            yield name, self.module(name)

    def _points(self) -> tuple[EntryPoint, ...]:
        return tuple(entry_points(group=self.group))


PLANS = Registry("vitos.policy.plans", "vitos.plans", helpers=("base",))
