"""The places that say the same thing say it: version, license, dependencies, interfaces, launch arguments."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

import pytest

import check_wheel

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def manifest() -> ElementTree.Element:
    return ElementTree.parse(ROOT / "package.xml").getroot()


def depends(manifest: ElementTree.Element, *kinds: str) -> set[str]:
    return {element.text for kind in kinds for element in manifest.findall(kind)}


def test_versions_agree(manifest):
    import engine_core

    assert manifest.findtext("version") == engine_core.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", engine_core.__version__)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with what the wheel installs, built from a source archive of the last commit."""
    if subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True).returncode:
        pytest.skip("needs the repository")
    pytest.importorskip("setuptools")
    directory = tmp_path_factory.mktemp("wheel")
    wheel = check_wheel.build_wheel(check_wheel.extract_archive("HEAD", directory), directory, "--no-build-isolation")
    folder = directory / "site-packages"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    return folder


def test_the_wheel_knows_its_version_and_has_every_file(installed):
    program = "import engine_core; print(engine_core.__version__, engine_core.__file__)"
    env = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", "-c", program]
    version, path = subprocess.run(
        command, cwd=installed, env=env, capture_output=True, text=True, check=True
    ).stdout.split()
    (metadata,) = installed.glob("edgellm-*.dist-info/METADATA")
    assert f"\nVersion: {version}\n" in metadata.read_text(encoding="utf-8")
    assert Path(path).is_relative_to(installed)
    archive = installed.parent / "edgellm_ros" / "engine_core"
    files = {path.relative_to(archive) for path in archive.rglob("*") if path.is_file()}
    assert files == {path.relative_to(installed / "engine_core") for path in (installed / "engine_core").rglob("*.*")}


def test_the_version_is_refused_without_a_place_that_has_it(tmp_path, monkeypatch):
    import engine_core

    monkeypatch.setattr(engine_core, "_PARENT", tmp_path)
    with pytest.raises(AttributeError, match="neither"):
        engine_core.__getattr__("__version__")
    information = tmp_path / "engine_core-2.3.4-py3.10.egg-info"  # as ament_cmake_python installs it
    information.mkdir()
    (information / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: engine_core\nVersion: 2.3.4\n")
    assert engine_core.__getattr__("__version__") == "2.3.4"


def test_package_xml_is_valid_and_the_changelog_has_its_version():
    """As bloom reads them: package.xml by REP-149, CHANGELOG.rst by REP-132."""
    pytest.importorskip("catkin_pkg")
    from catkin_pkg.changelog import get_changelog_from_path
    from catkin_pkg.package import parse_package

    warnings: list[str] = []
    package = parse_package(str(ROOT / "package.xml"), warnings=warnings)
    assert warnings == []
    path = ROOT / "CHANGELOG.rst"
    headings = re.findall(r"^(.+)\n-+$", path.read_text(encoding="utf-8"), re.M)
    versions = [version for version, *_ in get_changelog_from_path(str(path)).foreach_version()]
    named = [heading.partition(" ")[0] for heading in headings if heading != "Forthcoming"]
    assert named and versions == named
    assert headings[0] == "Forthcoming" or versions[0] == package.version


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


def test_the_lock_file_pins_every_requirement_with_hashes():
    """``pip install --require-hashes`` takes nothing else; and no index is named, so that any mirror serves."""
    from packaging.requirements import Requirement

    import lock

    text = lock.LOCK.read_text(encoding="utf-8")
    assert "://" not in text and "--index" not in text and "--find-links" not in text
    pinned = [Requirement(line.partition(" \\")[0]) for line in text.splitlines() if re.match(r"[a-z]", line)]
    assert (
        text.count("==") >= len(pinned) == len(re.findall(r"\\\n(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+", text))
    )
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if re.match(r"[a-z]", line):
            wanted = Requirement(line)
            name = wanted.name.replace("_", "-").lower()
            versions = [str(each.specifier).removeprefix("==") for each in pinned if each.name == name]
            assert any(wanted.specifier.contains(version) for version in versions), f"{line}: run tools/lock.py write"


def test_third_party_imports_are_required():
    """What the installed code imports is in requirements.txt, or stands here as optional."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    required = set(re.findall(r"^([\w-]+)", text, re.M))
    optional = {"torch", "cuda", "tensorrt", "cryptography"}
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
