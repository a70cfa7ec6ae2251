"""The catalog: tests, pages and the command line are made from it, so it must hold every policy."""

import inspect
import pkgutil
import re
from importlib import import_module
from pathlib import Path

import pytest

import graphkv
from graphkv import ArgumentTypeError, Policy, Wrapper, adapters
from graphkv.adapters.catalog import BASES, ENTRIES, LOADED, LOADED_WRAPPERS, WRAPPERS

ROOT = Path(__file__).parents[2]
each_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.policy.__name__)


def concrete(names):
    """The policies among some values that stand for themselves: not the base classes of others."""
    kinds = {value for value in names if inspect.isclass(value) and issubclass(value, Policy)}
    return {kind for kind in kinds if not inspect.isabstract(kind) and kind is not Wrapper}


def written():
    """Every policy that a file of the adapters defines, public or not."""
    modules = [import_module(f"graphkv.adapters.{found.name}") for found in pkgutil.iter_modules(adapters.__path__)]
    return {
        kind
        for module in modules
        for kind in concrete(vars(module).values())
        if kind.__module__ == module.__name__ and kind.__name__ in module.__all__
    }


def test_every_policy_has_an_import_line_and_an_entry():
    public = concrete(getattr(graphkv, name) for name in graphkv.__all__)
    entries = [entry.policy for entry in ENTRIES]

    # A class that several policies share, such as that of settled budgets, is in no module's __all__.
    assert sorted(kind.__name__ for kind in written() - public) == [], "no import line in graphkv/adapters/__init__.py"
    assert sorted(kind.__name__ for kind in public - set(entries)) == [], "no entry in graphkv/adapters/catalog.py"
    assert len(entries) == len(set(entries))
    assert set(entries) <= public


def test_names_of_the_command_line_are_unique():
    names = [entry.name for entry in ENTRIES if entry.name]

    assert len(names) == len(set(names)) == len([*BASES, *LOADED, *WRAPPERS, *LOADED_WRAPPERS])
    assert all(issubclass(kind, Wrapper) for kind in WRAPPERS.values())
    assert not any(issubclass(kind, Wrapper) for kind in BASES.values())


@each_entry
def test_an_entry_makes_its_policy(entry):
    budget = BASES["snapkv"](budget=12) if entry.is_wrapper else 12
    if entry.holds_arrays:
        with pytest.raises(TypeError, match=r"importance|gates|kernels"):
            entry.make(budget)
    else:
        assert type(entry.make(budget, **entry.small)) is entry.policy


@each_entry
def test_a_budget_without_a_name_is_told_what_the_policy_takes(entry):
    name = entry.policy.__name__
    with pytest.raises(ArgumentTypeError) as caught:
        entry.policy(512)

    # One place for a value is the base's, and the base is checked where nothing else is missing.
    parameters = inspect.signature(entry.policy).parameters.values()
    if not entry.is_wrapper:
        takes = ", ".join(f"{each.name}=..." for each in parameters)
        assert (
            str(caught.value)
            == f"{name} must be called as {name}({takes}); too many positional arguments in {name}(512)"
        )
    elif all(each.default is not each.empty for each in list(parameters)[1:]):
        assert str(caught.value) == "base must be a Policy; got int"
    else:
        assert re.fullmatch(
            rf"{name} must be called as {name}\(base, .+\); missing .+ in {name}\(512\)", str(caught.value)
        )


@each_entry
def test_a_policy_of_a_paper_names_it(entry):
    """The class's references and the entry must not part; both are what a reader looks a number up in."""
    text = inspect.getdoc(entry.policy)

    assert (entry.paper in text) if entry.paper else ("References" not in text)


@each_entry
def test_the_pages_name_every_policy(entry):
    page = (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")

    # In all tables that docs/support.py writes.
    assert page.count(f"| {{py:class}}`graphkv.{entry.policy.__name__}`") == 3
    assert not entry.paper or f"arxiv.org/abs/{entry.paper}" in page
