"""Modules that draw can be put into one script: a report has no server to import them from."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from bireme.observe import drawing

FOLDER = Path(drawing.__file__).parent
MODULES = {path.name: path.read_text() for path in FOLDER.glob("*.js") if "min" not in path.name}


def test_their_names_do_not_collide() -> None:
    declared = r"^(?:export )?(?:async )?(?:function\*?|class|const|let) (\w+)"
    names = Counter(name for text in MODULES.values() for name in re.findall(declared, text, re.M))
    assert "GanttView" in names
    assert [name for name, num in names.items() if num > 1] == []


def test_they_import_one_another_and_nothing_else_a_line_each() -> None:
    for name, text in MODULES.items():
        imports = re.findall(r"^import .*$", text, re.M)
        for line in imports:
            found = re.fullmatch(r'import \{ [\w, ]+ \} from "\./(\w+\.js)";', line)
            assert found, f"{name}: {line}"
            assert found[1] in MODULES
        assert len(re.findall(r"\bimport\b", text)) == len(imports), name


def test_data_never_becomes_markup() -> None:
    for name, text in MODULES.items():
        assert not re.search("innerHTML|outerHTML|insertAdjacentHTML|document.write", text), name
