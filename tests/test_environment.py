"""pyproject.toml, constraints.txt, environment.yml, the Makefile and the workflows describe one environment."""

import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import rnnkernels

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line.strip() and not line.startswith("#")
]


def linux(python):
    """Return the marker environment of a current CPython on Linux."""
    patch = {"3.10": "13", "3.11": "7", "3.12": "1", "3.13": "0"}[python]
    return {
        "extra": "",
        "implementation_name": "cpython",
        "os_name": "posix",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "python_full_version": f"{python}.{patch}",
        "python_version": python,
        "sys_platform": "linux",
    }


def applicable(requirements, environment):
    return [entry for entry in requirements if entry.marker is None or entry.marker.evaluate(environment)]


def pinned(environment):
    """Return the pinned version of every package, by canonical name."""
    pins = applicable(PINS, environment)
    versions = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}
    assert len(versions) == len(pins), "a package is pinned twice"
    return versions


def requirements(extras):
    """Return the project's requirements with these extras, its references to its own extras resolved."""
    found, waiting = [Requirement(text) for text in PROJECT["dependencies"]], list(extras)
    while waiting:
        for requirement in map(Requirement, EXTRAS[waiting.pop()]):
            if requirement.name == PROJECT["name"]:
                waiting.extend(requirement.extras)
            else:
                found.append(requirement)
    return found


def make_variable(name):
    return re.search(rf"^{name} :?\??= *(.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)[1]


def test_every_constraint_is_one_public_version():
    for pin in PINS:
        (specifier,) = pin.specifier
        assert specifier.operator == "==", pin
        assert pin.url is None, pin
        # A local version such as +cpu exists on no index but one; == without it matches it too.
        assert Version(specifier.version).local is None, pin


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_pin_what_the_project_requires(python):
    environment = linux(python)
    versions = pinned(environment)
    for requirement in applicable(requirements(EXTRAS), environment):
        name = canonicalize_name(requirement.name)
        assert name in versions, f"{requirement} is not pinned for Python {python}"
        assert requirement.specifier.contains(versions[name]), f"{requirement}, but {versions[name]} is pinned"


def test_installed_versions_are_the_pinned_ones():
    versions = pinned(default_environment())
    checked = 0
    for distribution in importlib.metadata.distributions():
        name = canonicalize_name(distribution.name)
        if name in versions:
            assert Version(distribution.version).public == versions[name], name
            checked += 1
    assert checked >= len(requirements(EXTRAS)) // 2


def test_make_installs_extras_that_exist():
    assert set(make_variable("EXTRAS").split(",")) <= set(EXTRAS)


def test_conda_environment_is_the_one_of_make():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["name"] == PROJECT["name"]
    *conda, last = environment["dependencies"]
    # conda brings only what pip cannot, so that constraints.txt rules every Python package.
    assert {re.split("[=<>]", entry)[0] for entry in conda} == {"python", "pip", "make"}
    (python,) = (entry.partition("=")[2] for entry in conda if entry.startswith("python"))
    assert python in PYTHONS
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)
    assert last == {"pip": ["-c constraints.txt", f"-e .[{make_variable('EXTRAS')}]"]}


def test_supported_pythons_agree_everywhere():
    named = [line.rpartition(":: ")[2] for line in PROJECT["classifiers"] if "Python :: 3." in line]
    workflow = yaml.safe_load((ROOT / ".github/workflows/checks.yml").read_text(encoding="utf-8"))
    assert named == PYTHONS
    assert workflow["jobs"]["newest"]["strategy"]["matrix"]["python"] == PYTHONS
    assert workflow["jobs"]["oldest"]["steps"][1]["with"]["python-version"] == PYTHONS[0]
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"


def test_the_version_stands_in_one_place():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == rnnkernels.__version__ == importlib.metadata.version("rnnkernels")


def test_the_package_alone_requires_only_torch_and_triton_on_linux():
    alone = [Requirement(text) for text in PROJECT["dependencies"]]
    assert [entry.name for entry in applicable(alone, linux("3.12"))] == ["torch", "triton"]
    assert [entry.name for entry in applicable(alone, linux("3.12") | {"platform_system": "Darwin"})] == ["torch"]


def test_no_project_file_names_a_package_index():
    named = re.compile(r"index-url|find-links|trusted-host|pypi\.org|download\.pytorch", re.I)
    files = ["pyproject.toml", "constraints.txt", "environment.yml", "Makefile", ".ci/run", "README.md"]
    for path in [*map(ROOT.joinpath, files), *ROOT.glob("tools/*"), *ROOT.glob(".github/workflows/*")]:
        if path.is_file():
            assert not named.search(path.read_text(encoding="utf-8")), path
