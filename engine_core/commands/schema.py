"""``edgellm schema``: the JSON schema of a ROS message type, for a request's json_schema."""

from __future__ import annotations

import argparse
import json

from engine_core.commands.arguments import add_command, whole_number
from engine_core.message_types import MAX_ITEMS, MAX_STRING


def add(commands) -> None:
    parser = add_command(
        commands,
        "schema",
        help="the JSON schema of a ROS message type, so that an answer is a message",
        description="Prints the JSON schema of a ROS message type, so that an answer is a message. Needs the Python "
        "package of the message: source its ROS workspace first.",
        example="edgellm schema geometry_msgs/msg/PoseStamped --fields pose.position,header.frame_id",
    )
    parser.add_argument(
        "type", help="such as geometry_msgs/msg/PoseStamped; of a service its request, of an action its goal"
    )
    parser.add_argument("--fields", help="these fields alone: dotted paths, with commas between them")
    count = whole_number(0)
    parser.add_argument(
        "--max-string", type=count, default=MAX_STRING, help="most characters of a string (default: %(default)s)"
    )
    parser.add_argument(
        "--max-items", type=count, default=MAX_ITEMS, help="most items of a sequence (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from engine_core.message_types import message_type, schema_of

    fields = [] if options.fields is None else options.fields.split(",")
    found = schema_of(message_type(options.type), fields, max_string=options.max_string, max_items=options.max_items)
    print(json.dumps(found, indent=2))
    return 0
