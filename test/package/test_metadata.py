"""The places that say the same thing say it: version, license, dependencies, interfaces, launch arguments."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def manifest() -> ElementTree.Element:
    return ElementTree.parse(ROOT / "package.xml").getroot()


def depends(manifest: ElementTree.Element, *kinds: str) -> set[str]:
    return {element.text for kind in kinds for element in manifest.findall(kind)}


def test_versions_agree(manifest):
    import engine_core

    command = [sys.executable, "setup.py", "--version"]
    setup = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()[-1]
    assert manifest.findtext("version") == engine_core.__version__ == setup


def test_license_is_the_same_everywhere(manifest):
    license_ = manifest.find("license")
    assert license_.text == "Apache-2.0" and license_.get("file") == "LICENSE"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert 'license="Apache-2.0"' in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_cmake_finds_what_package_xml_declares(manifest):
    cmake = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    found = set(re.findall(r"find_package\((\w+) REQUIRED\)", cmake))
    assert found <= depends(manifest, "buildtool_depend", "build_depend", "depend", "test_depend")


def test_messages_of_the_interfaces_are_dependencies(manifest):
    used = set()
    for path in [*ROOT.glob("msg/*.msg"), *ROOT.glob("srv/*.srv"), *ROOT.glob("action/*.action")]:
        used |= set(re.findall(r"^(\w+)/\w+", path.read_text(encoding="utf-8"), re.M))
    assert used - {"edgellm_ros"} <= depends(manifest, "depend")


def test_ros_packages_the_code_imports_are_dependencies(manifest):
    """A package that is only there because something else pulled it in is missing on the next robot."""
    declared = depends(manifest, "depend", "exec_depend") | {"edgellm_ros"}
    names = r"rclpy|launch\w*|diagnostic\w+|\w+_msgs|\w+_interfaces|ament_index_python"
    pattern = re.compile(rf"^\s*(?:from|import) ({names})\b", re.M)
    for path in [*ROOT.glob("edgellm_ros/*.py"), *ROOT.glob("launch/*.py")]:
        missing = set(pattern.findall(path.read_text(encoding="utf-8"))) - declared
        assert not missing, f"{path.name} imports {missing}, which package.xml does not declare"


def test_the_oldest_versions_are_those_of_the_lower_bounds():
    """What "make test-oldest" tests is what requirements.txt and setup.py allow."""
    import oldest

    assert oldest.TARGET.read_text(encoding="utf-8") == oldest.contents(), "run python tools/oldest.py write"


@pytest.mark.parametrize(
    "requirement, found",
    [
        ("a>=1.2", "a==1.2"),
        ("a-b>=1.2.3,<2", "a-b==1.2.3"),
        ('a>=1,<2; python_version < "3.11"', 'a==1; python_version < "3.11"'),
    ],
)
def test_the_oldest_version_is_the_lower_bound(requirement, found):
    import oldest

    assert oldest.oldest(requirement) == found


@pytest.mark.parametrize("requirement", ["a", "a<2", "a==2", "a<2,>=1"])
def test_a_requirement_without_a_lower_bound_is_told(requirement):
    import oldest

    with pytest.raises(ValueError, match="no lower bound"):
        oldest.oldest(requirement)


def test_third_party_imports_are_required():
    """What the installed code imports is in requirements.txt, or stands here as optional."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    required = set(re.findall(r"^([\w-]+)", text, re.M))
    optional = {"torch", "cuda", "tensorrt"}
    provided = sys.stdlib_module_names | {"engine_core", "__future__"} | optional | required
    pattern = re.compile(r"^\s*(?:from|import) ([a-z]\w*)[\w.]*(?: import| as|$)", re.M)
    for path in (ROOT / "engine_core").rglob("*.py"):
        imported = set(pattern.findall(path.read_text(encoding="utf-8")))
        assert imported <= provided, f"{path.relative_to(ROOT)}: {imported - provided}"


def test_every_script_is_installed_and_runnable():
    cmake = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    for script in (ROOT / "scripts").iterdir():
        assert f"scripts/{script.name}" in cmake
        assert script.stat().st_mode & 0o111, f"{script} is not executable"
