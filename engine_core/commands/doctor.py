"""``edgellm doctor``: what is installed, what can run here, and what to install."""

from __future__ import annotations

import argparse
import json

from engine_core.commands.arguments import add_command
from engine_core.commands.tables import print_notes, print_table, print_verdict
from engine_core.memory import format_bytes


def add(commands) -> None:
    parser = add_command(
        commands,
        "doctor",
        help="what is installed, which backends and variants can run here, why not, and what to install",
        description="Shows what is installed, which backends and variants can run here, why not, and what to install. "
        "Exit status 1 if no backend can run here.",
        example="edgellm doctor",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document, bytes")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from engine_core.planning.doctor import examine

    found = examine()
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)
    return 0 if found["healthy"] else 1


def _verdict(found: dict) -> str:
    backends = dict.fromkeys(check["backend"] for check in found["backends"])
    run = dict.fromkeys(check["backend"] for check in found["backends"] if check["runs"])
    if found["missing"]:
        return f"The node cannot run here: it lacks {', '.join(found['missing'])}."
    if not run:
        return f"None of the {len(backends)} backends can run here; the table below says why."
    return f"{len(run)} of {len(backends)} backends can run here: {', '.join(run)}."


def _print(found: dict) -> None:
    print_verdict(_verdict(found), good=found["healthy"])
    print()
    print_table(["machine", ""], _machine(found), left=2)
    print()
    packages = [[name, version or "not installed"] for name, version in found["packages"].items()]
    print_table(["package", "version"], packages, left=2)
    print()
    checks = found["backends"]
    rows = [[c["backend"], c["quantization"], "yes" if c["runs"] else "no", c["why_not"]] for c in checks]
    print_table(["backend", "variant", "runs here", "why not"], rows, left=4)
    print()
    lines = dict.fromkeys(check["install"] for check in checks if check["install"])
    notes = [f"The node lacks {name}: pip install {name}" for name in found["missing"]]
    notes += [] if found["packages"]["onnx"] else ["Building for the CPU needs onnx: pip install 'onnx>=1.17'"]
    notes += [f"For {_for(checks, line)}: {line}" for line in lines]
    print_notes([*notes, *found["hints"]])


def _for(checks: list[dict], line: str) -> str:
    return ", ".join(dict.fromkeys(check["backend"] for check in checks if check["install"] == line))


def _machine(found: dict) -> list[list[str]]:
    cpu, ros, jetson = found["cpu"], found["ros"], found["jetson"]
    rows = [
        ["system", found["system"]],
        ["Python", found["python"]],
        ["ROS", _ros(ros)],
        ["CPU", f"{cpu['name']}, {cpu['cores']} cores ({', '.join(cpu['features']) or 'no vector features known'})"],
        ["memory free", format_bytes(cpu["memory_free"])],
    ]
    if cpu["governor"]:
        rows.append(["CPU governor", cpu["governor"]])
    if jetson:
        rows.append(["Jetson", f"{jetson['model']}, L4T {jetson['l4t']} (JetPack {jetson['jetpack']})"])
    if jetson.get("power_mode"):
        rows.append(["power mode", jetson["power_mode"]])
    for gpu in found["gpus"]:
        memory = format_bytes(gpu["memory"]) + (" shared with the CPU" if gpu["integrated"] else "")
        rows.append(["GPU", f"{gpu['name']}, sm_{gpu['capability']}, {gpu['num_sms']} multiprocessors, {memory}"])
    if found["cuda_driver"]:
        rows.append(["NVIDIA driver", f"up to CUDA {found['cuda_driver']}"])
    if found["no_gpu"]:
        rows.append(["GPU", f"none: {found['no_gpu']}"])
    return rows


def _ros(ros: dict) -> str:
    if not ros["distro"] and not ros["rclpy"]:
        return "not sourced in this shell"
    parts = [ros["distro"] or "distribution unknown", "with rclpy" if ros["rclpy"] else "without rclpy"]
    parts.append("edgellm_ros is installed" if ros["edgellm_ros"] else "edgellm_ros is not in it")
    return ", ".join(parts)
