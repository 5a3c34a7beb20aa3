"""Write what is generated: config/llm.yaml, and parts of docs/parameters.md, interfaces.md, cli.md and errors.md.

python3 tools/write_generated.py           # after a change of parameters, interfaces or options
python3 tools/write_generated.py --check   # exit status 1 and the names of the files that are not up to date
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import docs_reference  # noqa: E402
from edgellm_ros.parameter_table import SECTIONS, Kind, ParameterSpec  # noqa: E402

_WIDTH = 118
_KINDS = {
    Kind.FIXED: "Fixed: taken at configure; a change while the node is configured is refused.",
    Kind.DYNAMIC: "Dynamic: a change, for instance by a slider of rqt, holds from the next request on.",
    Kind.AT_ACTIVATE: "At activate: a change is accepted at any time and taken at the next activate.",
    Kind.AT_START: "Taken when the process starts; a change is refused.",
}


def shown(value: object) -> str:
    """Return a default as YAML and the pages spell it."""
    return json.dumps(value, ensure_ascii=False)


def config_file() -> str:
    """Return config/llm.yaml: every parameter with its description and default."""
    lines = ["# Every parameter of the node with its default. Written by tools/write_generated.py.", "/**:"]
    lines.append("  ros__parameters:")
    for title, specs in SECTIONS.items():
        (kind,) = {spec.kind for spec in specs}
        lines += ["", f"    # --- {title} ---", f"    # {_KINDS[kind]}"]
        for spec in specs:
            comment = textwrap.wrap(spec.full_description, _WIDTH, initial_indent="    # ", subsequent_indent="    # ")
            lines += [*comment, f"    {spec.name}: {shown(spec.default)}"]
    return "\n".join(lines) + "\n"


def parameter_table() -> str:
    """Return the table of parameters."""

    def row(spec: ParameterSpec) -> str:
        default = spec.default if isinstance(spec.default, str) and spec.default else shown(spec.default)
        kind = spec.kind.value + (", launch" if spec.launch_default is not None else "")
        return f"| `{spec.name}` | `{default}` | {kind} | {spec.full_description} |"

    rows = [row(spec) for specs in SECTIONS.values() for spec in specs]
    return "\n".join(["| parameter | default | kind | meaning |", "|---|---|---|---|", *rows]) + "\n"


def between_marks(text: str, name: str, content: str) -> str:
    """Return ``text`` with ``content`` between the marks of ``name``. Raises ValueError if they are missing."""
    begin, end = f"<!-- {name}: written by tools/write_generated.py -->\n", f"<!-- end of {name} -->\n"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"The lines {begin!r} and {end!r} must each be there once.")
    before, _, rest = text.partition(begin)
    return before + begin + content + end + rest.partition(end)[2]


def generated() -> dict[Path, str]:
    """Return file → what it has to hold."""
    parts = {
        "parameters": parameter_table(),
        "interfaces": docs_reference.interfaces(),
        "commands": docs_reference.commands(),
        "limits": docs_reference.limits(),
    }
    pages = {"parameters": "parameters.md", "interfaces": "interfaces.md", "commands": "cli.md",
             "limits": "errors.md"}  # fmt: skip
    found = {ROOT / "config" / "llm.yaml": config_file()}
    for name, content in parts.items():
        page = ROOT / "docs" / pages[name]
        found[page] = between_marks(page.read_text(encoding="utf-8"), name, content)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a file would change")
    check = parser.parse_args().check
    changed = [(path, text) for path, text in generated().items() if path.read_text(encoding="utf-8") != text]
    for path, text in changed:
        print(f"{path.relative_to(ROOT)} {'is not up to date' if check else 'written'}")
        if not check:
            path.write_text(text, encoding="utf-8")
    return 1 if check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
