"""The wheel is what a user installs: everything in src/bireme is in it, and it works from there."""

import subprocess
import sys
import sysconfig
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

import bireme

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "bireme"


def run(*args: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *args], cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{' '.join(args)}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


def package_files(package: Path) -> set[str]:
    """Every file under the package, caches apart, relative to it."""
    return {
        path.relative_to(package).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which nothing but our wheel is installed."""
    work = tmp_path_factory.mktemp("packaging")
    pip = ("-m", "pip", "--disable-pip-version-check", "--quiet")
    offline = ("--no-deps", "--no-index")
    run(*pip, "wheel", *offline, "--no-build-isolation", "-w", str(work), str(ROOT), cwd=work)
    (wheel,) = work.glob("bireme-*-py3-none-any.whl")
    run(*pip, "install", *offline, "--target", str(work / "site"), str(wheel), cwd=work)
    return work / "site"


@pytest.fixture(scope="module")
def distribution(site: Path) -> PathDistribution:
    (info,) = site.glob("*.dist-info")
    return PathDistribution(info)


def test_the_wheel_imports_and_knows_its_version(
    site: Path, distribution: PathDistribution
) -> None:
    probe = "import sys; sys.path.insert(0, sys.argv[1]); import bireme; "
    probe += "print(bireme.__file__, bireme.__version__)"
    file, version = run("-c", probe, str(site), cwd=site.parent).rsplit(" ", 1)
    assert Path(file) == site / "bireme" / "__init__.py"
    assert version == distribution.version == bireme.__version__


def test_the_wheel_holds_every_file_of_the_package(site: Path) -> None:
    assert package_files(site / "bireme") == package_files(PACKAGE)


def test_the_wheel_is_typed_and_licensed(site: Path, distribution: PathDistribution) -> None:
    assert (site / "bireme" / "py.typed").is_file()
    assert distribution.metadata["License-Expression"] == "Apache-2.0"
    assert "Apache License" in (distribution.read_text("licenses/LICENSE") or "")


def test_the_wheel_brings_the_bireme_command(site: Path, distribution: PathDistribution) -> None:
    (command,) = distribution.entry_points
    assert (command.group, command.name) == ("console_scripts", "bireme")
    assert command.value == "bireme.cli:main"
    scripts = Path(sysconfig.get_path("scripts")).name
    assert (site / scripts / "bireme").is_file()
