"""~/message_schema: the JSON schema of a ROS message type."""

from __future__ import annotations

import json

from ament_index_python import get_resource, has_resource
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.node import Node

from edgellm_ros import qos
from edgellm_ros.conversions import error_code, error_message
from edgellm_ros.srv import MessageSchema
from edgellm_ros.threads import run_in
from engine_core.errors import InvalidRequestError
from engine_core.message_types import MAX_ITEMS, MAX_STRING, MessageTypeError, message_type, schema_of, split_name
from engine_core.request import LIMITS
from engine_core.serving.work_pool import WorkPool

_MAX_FIELDS = 1024


class MessageSchemaService:
    """Answers ~/message_schema in ``pool``, since a package that is new has to be imported. It needs no engine."""

    def __init__(self, node: Node, pool: WorkPool) -> None:
        self._node = node
        self._pool = pool
        node.create_service(
            MessageSchema,
            "~/message_schema",
            self._answer,
            qos_profile=qos.SERVICE,
            callback_group=ReentrantCallbackGroup(),
        )

    async def _answer(self, request: MessageSchema.Request, response: MessageSchema.Response) -> MessageSchema.Response:
        try:
            response.json_schema = await run_in(self._pool, self._node, lambda: message_schema(request))
        except Exception as error:
            response.error_code, response.error_message = error_code(error), error_message(error)
        return response


def message_schema(request: MessageSchema.Request) -> str:
    """Return the schema that ``request`` asks for. Raises MessageTypeError or InvalidRequestError."""
    LIMITS.check_count("fields", len(request.fields), _MAX_FIELDS)
    package, kind, short = split_name(request.type)
    # Nothing is imported for a client but packages of interfaces.
    known = get_resource("rosidl_interfaces", package)[0] if has_resource("rosidl_interfaces", package) else ""
    if f"{kind}/{short}.{kind}" not in known.split():
        where = "is not installed where the node runs" if not known else f"has no {kind}/{short}"
        raise MessageTypeError(f"The package {package} {where}; source its workspace before the node is started.")
    limits = {"max_string": request.max_string or MAX_STRING, "max_items": request.max_items or MAX_ITEMS}
    text = json.dumps(schema_of(message_type(request.type), request.fields, **limits))
    if len(text) > LIMITS.schema_bytes:
        raise InvalidRequestError(
            f"The JSON schema of {request.type} has {len(text)} bytes, but a request's may have {LIMITS.schema_bytes}; "
            "name the fields that are needed."
        )
    return text
