"""Arrows between the rooms of the package point down, so that a room is understood from those below it alone."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# From the bottom: what stands in one line does not know of one another.
FLOORS = (
    ("orpo_kernels", "files", "packages", "hub", "ranks", "tokens", "launch"),
    ("loss", "layouts", "data", "runs", "recipes"),
    ("model", "rendering", "report"),
    ("generation", "integrations"),
    ("judges", "trainer"),
    ("cli", "demo"),
    ("train", "generate", "merge"),
    ("commands",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str | None:
    """The room that a module is in; None for the package itself, which imports nothing before it is asked."""
    first, _, rest = module.partition(".")
    return first if first == "orpo_kernels" else rest.partition(".")[0] or None


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, module) of each import of ours in a file, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "orpo":
            names = [f"orpo.{alias.name}" for alias in node.names if alias.name != "__version__"]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [(node.lineno, name) for name in names if name.partition(".")[0] in ("orpo", "orpo_kernels")]
    return found


@pytest.mark.parametrize("room", [room for room in FLOOR if room != "orpo_kernels"])
def test_a_room_imports_those_below_it_alone(room):
    path = ROOT / "orpo" / room
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    assert files
    for file in files:
        for line, module in imports(file):
            other = room_of(module)
            assert other in (room, None) or FLOOR[other] < FLOOR[room], (
                f"{file.relative_to(ROOT)}:{line} imports {module}"
            )


def test_every_room_has_its_floor():
    there = {path.stem for path in (ROOT / "orpo").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert there - {"__init__"} == FLOOR.keys() - {"orpo_kernels"}


def test_the_kernels_know_nothing_of_the_package():
    folder = ROOT / "kernels/orpo_kernels"
    for file in sorted(folder.rglob("*.py")):
        assert all(module.startswith("orpo_kernels") for _, module in imports(file)), file
    # What a CPU needs never imports triton.
    for file in (*folder.glob("*.py"), *(folder / "cpu").glob("*.py")):
        assert not any(".gpu" in module for _, module in imports(file)), file
