"""What the source may not import or call, and which modules stay free of torch.

Nothing between our processes is ever unpickled, ranks are started without multiprocessing, and
nobody waits by sleeping. Read from the syntax tree, so a lazy import inside a function counts too.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bireme

PACKAGE = Path(bireme.__file__).parent

FORBIDDEN_MODULES = {
    "cloudpickle": "unpickling runs code",
    "dill": "unpickling runs code",
    "marshal": "reads bytes without checks",
    "multiprocessing": "pickles, and imports the caller's __main__ again",
    "pickle": "unpickling runs code",
    "shelve": "unpickling runs code",
}

FORBIDDEN_NAMES = {
    "eval": "runs what it is given",
    "exec": "runs what it is given",
    "builtins.eval": "runs what it is given",
    "builtins.exec": "runs what it is given",
    "time.sleep": "wait for the event itself, with a deadline",
}

# torch.distributed's collectives on Python objects, which pickle them.
OBJECT_COLLECTIVES = {
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "recv_object_list",
    "scatter_object_list",
    "send_object_list",
}

# These import in milliseconds, without torch; those not written yet are left out below.
PLAIN_MODULES = [
    "bireme.config",
    "bireme.hf_config",
    "bireme.model_config",
    "bireme.errors",
    "bireme.request",
    "bireme.trace",
    "bireme.cluster",
    "bireme.text",
    "bireme.parallel.layout",
    "bireme.parallel.memory",
    "bireme.parallel.counters",
    "bireme.parallel.broadcast",
    "bireme.kvcache.block_manager",
    "bireme.engine.scheduler",
    "bireme.engine.channel",
    "bireme.engine.deadline",
    "bireme.vision.batching",
    "bireme.vision.naming",
    "bireme.checkpoint.reader",
    "bireme.checkpoint.manifest",
    "bireme.checkpoint.sharder",
    "bireme.planning.probe.plan",
    "bireme.planning.probe.statistics",
]


def violations(source: str) -> list[tuple[int, str]]:
    """(line, what is wrong there) of every forbidden import, name and call, in line order."""
    tree = ast.parse(source)
    aliases = dict(_imported_names(tree))
    found: set[tuple[int, str]] = set()

    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                used = [alias.name for alias in names]
            case ast.ImportFrom(module=module, names=names, level=0):
                used = [f"{module}.{alias.name}" for alias in names]
            case ast.Call(func=func, args=[ast.Constant(value=str(module)), *_]) if _dotted_name(
                func, aliases
            ) in {"__import__", "importlib.import_module"}:
                used = [module]
            case ast.Attribute() | ast.Name(ctx=ast.Load()):
                used = [_dotted_name(node, aliases)]
            case _:
                used = []
        for name in used:
            found |= {(node.lineno, complaint) for complaint in _complaints_about_name(name)}
        if isinstance(node, ast.Call):
            found |= {
                (node.lineno, complaint) for complaint in _complaints_about_call(node, aliases)
            }
    return sorted(found)


def _imported_names(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(local name, full dotted name) of everything that the module imports by absolute name."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    if alias.asname:
                        yield alias.asname, alias.name
            case ast.ImportFrom(module=str(module), names=names, level=0):
                for alias in names:
                    yield alias.asname or alias.name, f"{module}.{alias.name}"


def _dotted_name(node: ast.expr, aliases: dict[str, str]) -> str:
    """``a.b.c`` for a chain of attributes on a name, aliases resolved; empty for anything else."""
    match node:
        case ast.Name(id=name):
            return aliases.get(name, name)
        case ast.Attribute(value=value, attr=attr):
            head = _dotted_name(value, aliases)
            return f"{head}.{attr}" if head else ""
    return ""


def _complaints_about_name(name: str) -> Iterator[str]:
    if name in FORBIDDEN_NAMES:
        yield f"{name}: {FORBIDDEN_NAMES[name]}"
    parts = name.split(".")
    in_torch = parts[:2] == ["torch", "multiprocessing"]
    if parts[0] in FORBIDDEN_MODULES or in_torch:
        module = parts[1] if in_torch else parts[0]
        yield f"{module}: {FORBIDDEN_MODULES[module]}"
    if parts[-1] in OBJECT_COLLECTIVES:
        yield f"{parts[-1]}: pickles what it sends"


def _complaints_about_call(call: ast.Call, aliases: dict[str, str]) -> Iterator[str]:
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if _dotted_name(call.func, aliases) in {"torch.load", "torch.serialization.load"}:
        match keywords.get("weights_only"):
            case ast.Constant(value=True):
                pass
            case _:
                yield "torch.load without weights_only=True: unpickling runs code"
    match keywords.get("allow_pickle"):
        case None | ast.Constant(value=False):
            pass
        case _:
            yield "allow_pickle: unpickling runs code"


@pytest.mark.parametrize(
    ("planted", "expected"),
    [
        ("import pickle", "pickle"),
        ("import os, pickle as p", "pickle"),
        ("from pickle import loads", "pickle"),
        ("def f():\n    import pickle", "pickle"),
        ("import importlib\nimportlib.import_module('pickle')", "pickle"),
        ("__import__('pickle')", "pickle"),
        ("import multiprocessing.shared_memory", "multiprocessing"),
        ("from multiprocessing import shared_memory", "multiprocessing"),
        ("import torch.multiprocessing as mp", "multiprocessing"),
        ("from torch import multiprocessing", "multiprocessing"),
        ("import torch\ntorch.multiprocessing.spawn(f)", "multiprocessing"),
        ("import shelve", "shelve"),
        ("import marshal", "marshal"),
        ("import dill", "dill"),
        ("import cloudpickle", "cloudpickle"),
        ("import torch\ntorch.load(path)", "torch.load"),
        ("import torch\ntorch.load(path, weights_only=False)", "torch.load"),
        ("import torch\ntorch.load(path, weights_only=trusted)", "torch.load"),
        ("import torch as t\nt.load(path)", "torch.load"),
        ("from torch import load as read\nread(path)", "torch.load"),
        ("import numpy as np\nnp.load(path, allow_pickle=True)", "allow_pickle"),
        (
            "import torch.distributed as d\nd.broadcast_object_list(x)",
            "broadcast_object_list",
        ),
        ("from torch.distributed import all_gather_object", "all_gather_object"),
        ("eval(text)", "eval"),
        ("list(map(eval, texts))", "eval"),
        ("exec(text)", "exec"),
        ("import builtins\nbuiltins.exec(text)", "builtins.exec"),
        ("import time\ntime.sleep(1)", "time.sleep"),
        ("import time as clock\nclock.sleep(1)", "time.sleep"),
        ("from time import sleep", "time.sleep"),
        ("from time import sleep as nap\nnap(1)", "time.sleep"),
    ],
)
def test_a_planted_violation_is_found_on_its_line(planted: str, expected: str) -> None:
    found = violations(planted)
    assert {complaint.split(":")[0].split(" ")[0] for _, complaint in found} == {expected}
    assert found[-1][0] == planted.count("\n") + 1


@pytest.mark.parametrize(
    "innocent",
    [
        "model.eval()",
        "import re\nre.compile('x')",
        "import torch\ntorch.load(path, map_location='cpu', weights_only=True)",
        "import json\njson.load(file)",
        "import asyncio\nasync def f(): await asyncio.sleep(0)",
        "import numpy as np\nnp.load(path, allow_pickle=False)",
        "import time\ntime.monotonic()",
        "from . import pickle_free",
        "'import pickle'",
    ],
)
def test_what_only_resembles_a_violation_passes(innocent: str) -> None:
    assert violations(innocent) == []


def test_the_source_has_no_violation() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert files
    found = [
        f"{file.relative_to(PACKAGE.parent)}:{line}: {complaint}"
        for file in files
        for line, complaint in violations(file.read_text(encoding="utf-8"))
    ]
    assert not found, "\n" + "\n".join(found)


def _is_written(module: str) -> bool:
    # Looked up as a file: importlib.util.find_spec would import the parents into this process.
    path = PACKAGE.parent / module.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


WRITTEN_PLAIN_MODULES = [module for module in PLAIN_MODULES if _is_written(module)]


def test_there_are_plain_modules() -> None:
    assert WRITTEN_PLAIN_MODULES


@pytest.mark.parametrize("module", WRITTEN_PLAIN_MODULES)
def test_a_plain_module_imports_without_torch(module: str) -> None:
    probe = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False", f"{module} imports torch"
