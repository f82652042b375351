"""The house that CONTRIBUTING.md draws: rooms, size, no circles between files. Layers are held by `lint-imports`."""

from pathlib import Path

import grimp
import pytest

PACKAGE = Path(__file__).parents[1] / "orpo_lite"
MODULES = [path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts]


def test_the_kit_stays_small() -> None:
    lines = sum(len(path.read_text("utf-8").splitlines()) for path in MODULES)
    assert lines <= 24_000, f"{lines} lines: what can be deleted?"
    assert len(MODULES) <= 140


def test_the_top_holds_packages_and_the_modules_that_start_a_command() -> None:
    entries = [path for path in PACKAGE.iterdir() if path.name != "__pycache__" and path.suffix in ("", ".py")]
    packages = [path for path in entries if path.is_dir()]
    assert len(packages) <= 12 and len(entries) <= 21
    loose = [path for path in entries if path.is_file() and path.name not in ("__init__.py", "__main__.py")]
    for path in loose:
        assert len(path.read_text("utf-8").splitlines()) <= 20, f"{path.name} is to hand over to a package, no more"


def test_no_circle_between_files() -> None:
    graph = grimp.build_graph("orpo_lite", exclude_type_checking_imports=True, cache_dir=None)
    above = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    while leaves := [name for name, imported in above.items() if not imported & above.keys()]:
        for name in leaves:
            del above[name]
    assert not above, f"these import each other, or stand above those that do: {sorted(above)}"


@pytest.mark.parametrize("name", ["common", "recipe"])
def test_light_packages_reach_no_heavy_one(name: str) -> None:
    graph = grimp.build_graph("orpo_lite", include_external_packages=True, cache_dir=None)
    heavy = {"torch", "transformers", "peft", "datasets", "accelerate"} & graph.modules
    for module in {f"orpo_lite.{name}"} | graph.find_descendants(f"orpo_lite.{name}"):
        assert not graph.find_modules_directly_imported_by(module) & heavy, module
