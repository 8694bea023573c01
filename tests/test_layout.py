"""Layout rules: imports, sizes, names, and the words of docstrings, each with a test.

A rule is a generator of (room, message) pairs over the files of the package.
"""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ntkrl"

FLOORS = [
    {"types", "lease", "messages", "configs"},
    {
        *("shorthands", "settings_list"),
        *("numerics", "trees", "intervals", "jaxpr"),
        *("user_files", "json_values", "durable_files", "workers"),
        "run_lock",
    },
    {"signals", "command_line"},
    {"softmax", "json_files"},
    {"gguf", "directory_kinds"},
    {"models", "scoring", "ntk", "runtime", "chat_templates"},
    # one pipeline, in order: a room may import those before it
    {"data"},
    {"rollout", "reward", "advantage", "report"},
    {"update"},
    {"probe"},
    {"attribution"},
    {"settings"},
    {"setup"},
    {"generate"},
    {"evaluation"},
    {"training"},
    {"plan", "prepare", "study"},
    {"api"},
    {"main"},
    {"__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# rooms that `import ntkrl` itself loads
FRONT_DOOR = {"models", "ntk", "api"}
# third-party packages and the rooms that may import them
OWNERS = {
    "flax": {"models"},
    "matplotlib": {"report", "study"},
    "orbax": {"runtime"},
    "ml_collections": {
        *("runtime", "settings", "training", "evaluation", "prepare", "study", "shorthands"),
        "api",
    },
    "pyarrow": {"data", "prepare"},
    "transformers": {"data", "chat_templates", "gguf"},
    "gguf": {"gguf"},
    "safetensors": {"models"},
    "tensorboardX": {"report"},
    "wandb": {"report"},
    "trackio": {"report"},
}
FILE_LINES, FUNCTION_LINES, ARGUMENTS, FILE_BYTES = 400, 60, 6, 300_000
# of the calls that `ntkrl` itself offers: notebooks complete keyword arguments, not fields
CALL_ARGUMENTS = 12

# functions that write a file without syncing it, and files that may call them: into a directory
# that is synced before it gets its name, for a log that people read while a command runs, or for a
# lock, which ends with the command
WRITERS = {"write_text", "write_bytes", "savez", "savez_compressed", "save_file", "copyfile"}
WRITERS |= {"touch"}
SYNCED_LATER = {"models/hf_export.py", "study/jobs.py", "run_lock.py"}

# names that say nothing about what they hold
BANNED_NAMES = {"found", "given", "told", "held", "own", "whole", "like", "one", "said"}
# a docstring opens with an imperative or with a noun phrase
BANNED_OPENINGS = {"what", "where", "how", "which", "who", "whose", "whether", "when", "why"}
SHARED_FILE_NAMES = {"__init__.py", "settings.py"}
# names of Python and JAX that begin with an underscore and have no public form
PUBLIC_PRIVATE = {"_asdict", "_cache_size", "_exit", "_fields", "_make", "_replace"}
PUBLIC_PRIVATE |= {"_ParameterKind"}


def room_of(path):
    """Return the name of the room a source file belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def sources():
    """Return (path, parsed tree) of every file of the package."""
    paths = sorted(PACKAGE.rglob("*.py"))
    assert len(paths) > 30
    return [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in paths]


SOURCES = sources()


def place(path, node=None):
    """Return a file's path in the checkout, with the line of a node."""
    name = path.relative_to(ROOT).as_posix()
    return name if node is None else f"{name}:{node.lineno}"


def check(rule):
    """Assert that a rule has no violation."""
    assert list(rule()) == []


def functions(tree):
    """Yield every function of a module, methods and nested ones included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


# imports


def imports(tree):
    """Yield the dotted names that a module imports anywhere in the file, with their nodes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


def upward_imports():
    """Yield imports of a room on the same or a higher floor, or of a folder outside the package."""
    for path, tree in SOURCES:
        room = room_of(path)
        for name, node in imports(tree):
            parts = name.split(".")
            if parts[0] in ("configs", "launch", "tests"):
                yield room, f"{place(path, node)}: imports {name}"
            if parts[0] != "ntkrl" or len(parts) < 2 or parts[1] == room:
                continue
            target = parts[1]
            if room == "__init__":
                allowed = target in FRONT_DOOR
            else:
                allowed = FLOOR[target] < FLOOR[room]
            if not allowed:
                yield room, f"{place(path, node)}: {room} imports {target}"


def exported(room):
    """Return the names that a room's `__init__` binds or lists; None for a room of one file."""
    init = PACKAGE / room / "__init__.py"
    if not init.exists():
        return None
    tree = ast.parse(init.read_text(encoding="utf-8"))
    lists = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    strings = [
        node for value in lists for node in ast.walk(value) if isinstance(node, ast.Constant)
    ]
    return {name for name, _ in bindings(tree)} | {node.value for node in strings}


def inner_imports():
    """Yield imports of another room's modules past its `__init__`, and of its private names."""
    exports = {room: exported(room) for room in FLOOR}
    for path, tree in SOURCES:
        room = room_of(path)
        for name, node in imports(tree):
            first, target, *rest = (*name.split("."), "")
            if first != "ntkrl" or target in (room, "") or room in ("__init__", "__main__"):
                continue
            rest = rest[:-1]
            inner = bool(rest) and exports[target] is not None and rest[0] not in exports[target]
            if inner or len(rest) > 1 or (rest and rest[0].startswith("_")):
                yield room, f"{place(path, node)}: {name} is not exported by ntkrl.{target}"


def private_attributes():
    """Yield uses of `object._name` where no file of the room defines that name."""
    defined = defaultdict(set)
    for path, tree in SOURCES:
        defined[room_of(path)] |= {name for name, _ in bindings(tree)}
    for path, tree in SOURCES:
        room = room_of(path)
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_"):
                continue
            if node.attr.startswith("__") or node.attr in PUBLIC_PRIVATE | defined[room]:
                continue
            yield room, f"{place(path, node)}: {node.attr} is private to another module"


def test_imports_go_down():
    """law: a room imports lower floors and itself, never its floor or anything above."""
    check(upward_imports)


def test_imports_use_what_a_room_exports():
    """law: another room is imported through its `__init__`, and no private name of it is used."""
    check(inner_imports)
    check(private_attributes)


def test_every_room_has_a_floor():
    """law: every room of the package is in FLOORS."""
    rooms = {room_of(path) for path, _ in SOURCES} - {"__init__"}
    assert rooms == set(FLOOR)


def test_third_party_packages_have_owners():
    """law: flax is imported by models alone, matplotlib by report, and so on."""
    messages = [
        f"{place(path, node)}: {name}"
        for path, tree in SOURCES
        for name, node in imports(tree)
        if name.split(".")[0] in OWNERS and room_of(path) not in OWNERS[name.split(".")[0]]
    ]
    assert messages == []


# sizes


def large_pieces():
    """Yield files, functions and argument lists above their limits."""
    for path, tree in SOURCES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > FILE_LINES:
            yield room_of(path), f"{place(path)}: {lines} lines"
        for node in functions(tree):
            length = node.end_lineno - node.lineno + 1
            if length > FUNCTION_LINES:
                yield room_of(path), f"{place(path, node)}: {node.name} has {length} lines"
    for path in sorted((ROOT / "configs").rglob("*.py")):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > FILE_LINES:
            yield "configs", f"{place(path)}: {lines} lines"


def long_signatures():
    """Yield functions of too many arguments, `self` and `cls` not counted."""
    for path, tree in SOURCES:
        for node in functions(tree):
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            count = sum(argument.arg not in ("self", "cls") for argument in arguments)
            limit = CALL_ARGUMENTS if room_of(path) == "api" else ARGUMENTS
            if count > limit:
                yield room_of(path), f"{place(path, node)}: {node.name} has {count} arguments"


def test_sizes():
    """law: files and functions stay readable."""
    check(large_pieces)


def test_arguments():
    """law: a function takes at most six arguments, a call of the package at most twelve."""
    check(long_signatures)


def test_committed_files_are_small():
    """law: no file of the checkout is larger than 300 kB."""
    paths = [path for path in ROOT.glob("*") if path.is_file()]
    for folder in ("ntkrl", "configs", "launch", "tests"):
        paths += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    large = {
        place(path)
        for path in paths
        if "__pycache__" not in path.parts and path.stat().st_size > FILE_BYTES
    }
    assert large == set()


# names and words


def bindings(tree):
    """Yield every name that a module binds, with its node."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node
        elif isinstance(node, ast.arg):
            yield node.arg, node
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            yield node.name, node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name, node) for alias in node.names)


def vague_names():
    """Yield bindings of banned names."""
    for path, tree in SOURCES:
        for name, node in bindings(tree):
            if name.lower().strip("_") in BANNED_NAMES:
                yield room_of(path), f"{place(path, node)}: {name}"


def question_docstrings():
    """Yield docstrings that open with a question word."""
    for path, tree in SOURCES:
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                opening = (ast.get_docstring(node) or "-").split()[0]
                if opening.lower().strip(",.:") in BANNED_OPENINGS:
                    name = getattr(node, "name", "the module")
                    yield room_of(path), f"{place(path)}: {name} opens with {opening}"


def ambiguous_classes():
    """Yield classes whose name is also that of a class in another room."""
    definitions = defaultdict(list)
    for path, tree in SOURCES:
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                definitions[node.name.lstrip("_")].append((room_of(path), place(path, node)))
    for name, places in definitions.items():
        if len({room for room, _ in places}) > 1:
            yield from ((room, f"{where}: class {name}") for room, where in places)


def ambiguous_files():
    """Yield file names that two rooms have."""
    rooms = defaultdict(set)
    for path, _ in SOURCES:
        rooms[path.name].add(room_of(path))
    for name, owners in rooms.items():
        if name not in SHARED_FILE_NAMES and len(owners) > 1:
            yield from ((room, f"{name} is a file of {sorted(owners)}") for room in owners)


def test_names_are_nouns():
    """law: no binding has an uninformative name, such as `found` or `given`."""
    check(vague_names)


def test_docstrings_are_statements():
    """law: no docstring opens with What, Where, How or another question word."""
    check(question_docstrings)


def test_names_are_unique():
    """law: no class name and no file name belongs to two rooms."""
    check(ambiguous_classes)
    check(ambiguous_files)


# safety


def test_nothing_dangerous():
    """law: no pickle, no eval or exec, no remote code, no torch in the package."""
    messages = []
    for path, tree in SOURCES:
        for name, _ in imports(tree):
            if name.split(".")[0] in ("pickle", "torch", "dill", "cloudpickle"):
                messages.append(f"{place(path)}: imports {name}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                if node.func.id in ("eval", "exec", "__import__"):
                    messages.append(f"{place(path, node)}: {node.func.id}")
            if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
                if getattr(node.value, "value", None) is not False:
                    messages.append(f"{place(path)}: {node.arg} is not False")
    assert messages == []


def plain_writes(tree):
    """Yield calls that write a file which a power cut leaves empty or cut short."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        name = node.func.id if isinstance(node.func, ast.Name) else name
        modes = [a.value for a in node.args[:2] if isinstance(a, ast.Constant)]
        modes += [k.value.value for k in node.keywords if k.arg == "mode"]
        creates = any(isinstance(m, str) and m[:1] in ("w", "x") and len(m) < 4 for m in modes)
        if name in WRITERS or (name == "open" and creates):
            yield node, name


def test_files_survive_a_power_cut():
    """law: results are written through `durable_files` alone, which syncs them.

    Appended lines are synced by their writers, and files in a new directory with it.
    """
    messages = [
        f"{place(path, node)}: {name}; write through ntkrl.durable_files"
        for path, tree in SOURCES
        if room_of(path) != "durable_files" and str(path.relative_to(PACKAGE)) not in SYNCED_LATER
        for node, name in plain_writes(tree)
    ]
    assert messages == []


def test_top_level():
    """law: the top level has the files of the design, and hidden files."""
    allowed = {"setup.py", "ntkrl", "configs", "launch", "tests", "README.md", "LICENSE"}
    built = {"runs", "build", "dist"}  # ignored by git
    names = {p.name for p in ROOT.iterdir() if not p.name.startswith(".")}
    names = {name for name in names if not name.endswith(".egg-info")}
    assert names - built <= allowed
