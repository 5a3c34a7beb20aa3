"""The files generated from the parameter table are up to date, and say what the table says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import write_generated  # noqa: E402


def test_generated_files_are_up_to_date():
    for path, text in write_generated.generated().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python3 tools/write_generated.py"


def test_the_limits_have_codes_of_the_interface():
    constants = (ROOT / "msg" / "ErrorCode.msg").read_text(encoding="utf-8")
    rows = [line.split("|") for line in write_generated.docs_reference.limits().splitlines()[2:]]
    assert len(rows) > 20 and len({row[1] for row in rows}) == len(rows)
    for row in rows:
        assert f" {row[3].strip(' `')}=" in constants, row


def test_the_parameter_file_has_every_parameter_with_its_default():
    values = yaml.safe_load(write_generated.config_file())["/**"]["ros__parameters"]
    specs = [spec for specs in write_generated.SECTIONS.values() for spec in specs]
    assert values == {spec.name: spec.default for spec in specs}
    assert {name: type(value) for name, value in values.items()} == {spec.name: type(spec.default) for spec in specs}


def test_every_default_passes_its_own_check():
    for specs in write_generated.SECTIONS.values():
        assert [spec.problem(spec.default) for spec in specs] == [""] * len(specs)


def test_the_table_needs_no_other_package():
    """ros2 launch runs on the system's Python, which need not be the one with the node's packages."""
    program = (
        "import sys; before = set(sys.modules); import edgellm_ros.parameter_table; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new - sys.stdlib_module_names - {'edgellm_ros', 'engine_core'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
