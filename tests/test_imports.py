"""Imports point downwards, between packages and inside them."""

import graphlib

import imports


def test_every_module_imports_from_its_room_or_from_below():
    places = {name: number for number, name in enumerate(imports.ROOMS)}
    for module, targets in imports.graph().items():
        for target in targets:
            assert places[imports.room(module)] >= places[imports.room(target)], f"{module} imports {target}"


def test_no_two_modules_need_each_other():
    known = imports.graph()
    packages = {module for module in known if (imports.ROOT / module.replace(".", "/") / "__init__.py").exists()}
    # a package's __init__ gathers what stands in it; what imports the package for one of its modules needs only that
    between = {module: targets - packages for module, targets in known.items() if module not in packages}
    graphlib.TopologicalSorter(between).prepare()


def test_only_the_top_rooms_see_the_whole_config():
    allowed = {"engine.evaluation", "engine.training", "commands", "engine config"}
    for module, targets in imports.graph().items():
        if "engine.config" in targets:
            assert imports.room(module) in allowed, module


def test_kernels_import_nothing_of_the_project():
    for module, targets in imports.graph().items():
        if imports.room(module).startswith("kernels"):
            assert all(target.startswith("kernels") for target in targets), module


def test_nothing_but_kernels_imports_their_insides():
    for module, targets in imports.graph().items():
        if not imports.room(module).startswith("kernels"):
            inside = {target for target in targets if target.startswith(("kernels.internal", "kernels._"))}
            assert not inside, f"{module} imports {inside}"


def test_relative_imports_are_read(tmp_path):
    """The reader of this graph sees what Python sees: each module's own list, by another way."""
    known = imports.graph()
    assert "kernels.internal.backend" in known["kernels.coding_rate"]  # from .internal.backend import ...
    assert "configs.errors" in known["engine.runs.folder"]  # from ...configs.errors import ...
    assert "engine.training.trainer" in known["engine.train"]  # within a function
    assert sum(map(len, known.values())) > 200
