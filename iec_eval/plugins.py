"""The plugin system: a fresh manager, loaded one distribution at a time, and what it registered.

Built-ins come in through the same hooks as everybody else. A third-party plugin that cannot be
imported or validated is set aside with its error; it never takes the program down.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module, metadata
from typing import Any

import pluggy

from iec_eval import __version__, hookspecs
from iec_eval.errors import PluginError, UnknownName, one_line
from iec_eval.options import BaseOptions
from iec_eval.stopping import Terminated

BUILTINS = (
    "iec_eval.models.hooks",
    "iec_eval.samplers.hooks",
    "iec_eval.efficiency.hooks",
    "iec_eval.callbacks.hooks",
    "iec_eval.metrics.hooks",
)
RESTRICT = "IEC_EVAL_PLUGINS"
BASES = {
    "model": ("iec_eval_models", "iec_eval.models.base", "DiffusionModel"),
    "sampler": ("iec_eval_samplers", "iec_eval.samplers.base", "Sampler"),
    "efficiency method": (
        "iec_eval_efficiency_methods",
        "iec_eval.efficiency.base",
        "EfficiencyMethod",
    ),
    "callback": ("iec_eval_callbacks", "iec_eval.callbacks.base", "DenoisingCallback"),
    "metric": ("iec_eval_metrics", "iec_eval.metrics.base", "Metric"),
}


@dataclass
class Distribution:
    """One installed source of plugins, as ``iec-eval plugins`` lists it."""

    distribution: str
    version: str
    hooks: list[str] = field(default_factory=list)
    names: dict[str, list[str]] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class Registered:
    """A class somebody registered, and who did."""

    cls: Any
    owner: str


class Registry:
    """Names to classes, for each kind of part.

    Attributes:
        manager: the pluggy manager, for the event hooks.
        distributions: what was found installed, broken ones included.
    """

    def __init__(self, manager: pluggy.PluginManager, distributions: list[Distribution]) -> None:
        self.manager, self.distributions = manager, distributions
        self._parts: dict[str, dict[str, list[Registered]]] = {kind: {} for kind in BASES}
        for distribution in distributions:
            self._collect(distribution)

    def names(self, kind: str) -> list[str]:
        """Registered names of a kind, sorted."""
        return sorted(self._parts[kind])

    def items(self, kind: str) -> Iterable[tuple[str, Registered]]:
        """Name and registration of everything of a kind, sorted; double names once for each."""
        return [(name, one) for name in self.names(kind) for one in self._parts[kind][name]]

    def get(self, kind: str, name: str) -> Any:
        """The class called ``name``.

        Raises UnknownName, or PluginError if two distributions claim the name.
        """
        found = self._parts[kind].get(name, [])
        if not found:
            raise UnknownName(kind, name, self.names(kind), hint=self._hint())
        if len(found) > 1:
            owners = " and ".join(one.owner for one in found)
            raise PluginError(
                f"{kind} {name!r} is registered by {owners}; uninstall one of them, or choose "
                f"the plugins to load with {RESTRICT}"
            )
        return found[0].cls

    def run_finished(self, result: Mapping[str, Any]) -> list[str]:
        """Tell every plugin that a run has ended; returns the complaints of those that failed."""
        complaints = []
        for implementation in self.manager.hook.iec_eval_run_finished.get_hookimpls():
            try:
                self._call(implementation, result)
            except (Exception, SystemExit) as error:  # it must not lose a finished run
                complaints.append(f"{implementation.plugin_name}: run_finished failed: {error}")
        return complaints

    def _call(self, implementation: Any, result: Mapping[str, Any]) -> None:
        arguments = {"result": dict(result)}
        implementation.function(*(arguments[name] for name in implementation.argnames))

    def _collect(self, distribution: Distribution) -> None:
        """All that a distribution registers, or nothing of it if any of it is broken."""
        named = self.manager.list_name_plugin()
        plugins = [plugin for name, plugin in named if _owner(name) == distribution.distribution]
        try:
            if distribution.error is None:
                found = [list(_registrations(self.manager, plugin)) for plugin in plugins]
        except (Exception, SystemExit) as error:
            if distribution.distribution == hookspecs.PROJECT:
                raise
            distribution.error = one_line(error)
        for number, plugin in enumerate(plugins):
            if distribution.error is None:
                self._add(distribution, plugin, found[number])
            else:
                self.manager.unregister(plugin)

    def _add(
        self, distribution: Distribution, plugin: Any, found: Iterable[tuple[str, list[Any]]]
    ) -> None:
        callers = self.manager.get_hookcallers(plugin) or []
        distribution.hooks.extend(caller.name for caller in callers)
        for kind, classes in found:
            for cls in classes:
                distribution.names.setdefault(kind, []).append(cls.name)
                owners = self._parts[kind].setdefault(cls.name, [])
                owners.append(Registered(cls, distribution.distribution))

    def _hint(self) -> str:
        good = [f"{d.distribution} {d.version}" for d in self.distributions if d.error is None]
        broken = [d.distribution for d in self.distributions if d.error is not None]
        hint = f"installed: {', '.join(good)}"
        return f"{hint}; broken: {', '.join(broken)}, see iec-eval plugins" if broken else hint


def load_registry() -> Registry:
    """Everything installed, registered on a fresh manager."""
    manager, distributions = plugin_manager()
    return Registry(manager, distributions)


def plugin_manager() -> tuple[pluggy.PluginManager, list[Distribution]]:
    """A fresh manager with the built-ins and the installed plugins, and what was found.

    Third-party plugins that fail to import, or whose hooks do not match a specification (a
    misspelled name, say), carry their error and are not registered.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    for module in BUILTINS:
        manager.register(import_module(module), name=f"{hookspecs.PROJECT}:{module}")
    manager.check_pending()
    found = {hookspecs.PROJECT: Distribution(hookspecs.PROJECT, __version__)}
    installed = sorted(metadata.entry_points(group=hookspecs.PROJECT), key=lambda e: e.name)
    wanted = _wanted()
    for entry_point in installed:
        if wanted is None or wanted & _names(entry_point):
            name, version = _distribution(entry_point)
            _load(manager, entry_point, found.setdefault(name, Distribution(name, version)))
    for name in sorted((wanted or set()).difference(*map(_names, installed))):
        error = f"{RESTRICT} names it, and no plugin that is installed is called that"
        found[name] = Distribution(name, "unknown", error=error)
    return manager, list(found.values())


def _wanted() -> set[str] | None:
    """The plugins that the environment chooses; None for all of them."""
    chosen = os.environ.get(RESTRICT)
    return None if chosen is None else {name.strip() for name in chosen.split(",")} - {""}


def _names(entry_point: metadata.EntryPoint) -> set[str]:
    """What a plugin may be called: its entry point, or its distribution."""
    return {entry_point.name, _distribution(entry_point)[0]}


def _load(
    manager: pluggy.PluginManager, entry_point: metadata.EntryPoint, distribution: Distribution
) -> None:
    plugin: Any = None
    try:
        plugin = entry_point.load()
        manager.register(plugin, name=f"{distribution.distribution}:{entry_point.value}")
        manager.check_pending()
    except BaseException as error:  # a plugin may even call sys.exit at import
        if isinstance(error, KeyboardInterrupt | Terminated):
            raise
        if plugin is not None and manager.is_registered(plugin):
            manager.unregister(plugin)
        distribution.error = one_line(error)


def _distribution(entry_point: metadata.EntryPoint) -> tuple[str, str]:
    if entry_point.dist is None:
        return entry_point.name, "unknown"
    return entry_point.dist.name, entry_point.dist.version


def _owner(plugin_name: str) -> str:
    return plugin_name.partition(":")[0]


def _registrations(manager: pluggy.PluginManager, plugin: Any) -> Iterable[tuple[str, list[Any]]]:
    """What ``plugin`` registers of each kind, checked."""
    for kind, (hook, module, base_name) in BASES.items():
        base = getattr(import_module(module), base_name)
        for implementation in getattr(manager.hook, hook).get_hookimpls():
            if implementation.plugin is plugin:
                yield kind, _checked(implementation.function, base, hook)


def _checked(function: Callable[[], Any], base: Any, hook: str) -> list[Any]:
    classes = function()
    if not isinstance(classes, list | tuple):
        raise PluginError(f"{hook} must return a list of classes, got {classes!r}")
    for cls in classes:
        if not (isinstance(cls, type) and issubclass(cls, base)):
            raise PluginError(f"{hook} returned {cls!r}, wanted a subclass of {base.__name__}")
        _check_class(cls)
    return list(classes)


def _check_class(cls: Any) -> None:
    if not isinstance(getattr(cls, "name", None), str) or not cls.name:
        raise PluginError(f"{cls.__name__} has no name")
    if not (isinstance(cls.Options, type) and issubclass(cls.Options, BaseOptions)):
        raise PluginError(f"{cls.__name__}.Options is not an Options class")
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        raise PluginError(f"{cls.__name__} does not define {', '.join(missing)}")
