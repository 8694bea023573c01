"""The house rules: who may import whom, and how large a file or function may grow."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ntkrl"

FLOORS = [
    {"types"},
    {"numerics", "trees", "intervals", "jaxpr"},
    {"softmax"},
    {"models", "scoring", "ntk", "runtime"},
    # one pipeline, in order: a room may import those before it
    {"data"},
    {"rollout", "reward", "advantage", "update", "report"},
    {"probe"},
    {"attribution"},
    {"settings"},
    {"setup"},
    {"generate"},
    {"evaluation"},
    {"training"},
    {"plan", "prepare", "study"},
    {"main"},
    {"__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# the package's front door offers the theorist's rooms by name
FRONT_DOOR = {"models", "ntk"}
# third-party packages that one room alone may import
OWNERS = {
    "flax": {"models"},
    "matplotlib": {"report", "study"},
    "orbax": {"runtime"},
    "ml_collections": {"runtime", "settings", "update", "training", "evaluation", "prepare"},
    "pyarrow": {"data", "prepare"},
    "transformers": {"data"},
    "safetensors": {"models"},
    "tensorboardX": {"report"},
    "wandb": {"report"},
}
FILE_LINES, FUNCTION_LINES = 400, 60


def room_of(path):
    """Name the room a source file belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(tree):
    """Yield the dotted names a module imports, wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sources():
    """Return (path, parsed tree) of every file of the package."""
    paths = sorted(PACKAGE.rglob("*.py"))
    assert len(paths) > 30
    return [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in paths]


def wrong_imports():
    """List imports that do not go down."""
    found = []
    for path, tree in sources():
        room = room_of(path)
        for name in imports(tree):
            parts = name.split(".")
            if parts[0] in ("configs", "launch", "tests"):
                found.append(f"{path}: imports {name}")
            if parts[0] != "ntkrl" or len(parts) < 2 or parts[1] == room:
                continue
            target = parts[1]
            if room == "__init__":
                allowed = target in FRONT_DOOR
            else:
                allowed = FLOOR[target] < FLOOR[room]
            if not allowed:
                found.append(f"{path}: {room} imports {target}")
    return found


def test_imports_go_down():
    """law: a room imports lower floors and itself, never a neighbour or anything above."""
    assert wrong_imports() == []


def test_every_room_has_a_floor():
    """law: nothing stands outside the drawing."""
    rooms = {room_of(path) for path, _ in sources()} - {"__init__"}
    assert rooms == set(FLOOR)


def test_third_party_packages_have_owners():
    """law: flax lives in models, matplotlib in report, and so on."""
    found = [
        f"{path}: {name}"
        for path, tree in sources()
        for name in imports(tree)
        if name.split(".")[0] in OWNERS and room_of(path) not in OWNERS[name.split(".")[0]]
    ]
    assert found == []


def test_sizes():
    """law: files and functions stay readable."""
    found = []
    for path, tree in sources():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > FILE_LINES:
            found.append(f"{path}: {lines} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > FUNCTION_LINES:
                    found.append(f"{path}: {node.name} has {length} lines")
    assert found == []


def test_nothing_dangerous():
    """law: no pickle, no eval or exec, no remote code, no torch in the package."""
    found = []
    for path, tree in sources():
        for name in imports(tree):
            if name.split(".")[0] in ("pickle", "torch", "dill", "cloudpickle"):
                found.append(f"{path}: imports {name}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                if node.func.id in ("eval", "exec", "__import__"):
                    found.append(f"{path}:{node.lineno}: {node.func.id}")
            if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
                if getattr(node.value, "value", None) is not False:
                    found.append(f"{path}: {node.arg} is not False")
    assert found == []


def test_top_level():
    """law: the top level holds what the design fixes, and hidden files."""
    allowed = {"setup.py", "ntkrl", "configs", "launch", "tests", "README.md", "LICENSE"}
    built = {"runs", "build", "dist"}  # ignored by git
    names = {p.name for p in ROOT.iterdir() if not p.name.startswith(".")}
    names = {name for name in names if not name.endswith(".egg-info")}
    assert names - built <= allowed
