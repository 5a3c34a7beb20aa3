"""The sampling options of a request that have one value, as msg/SamplingOptions declares them."""

from __future__ import annotations

from edgellm_ros.msg import SamplingOptions

_PYTHON_TYPES = {"double": float, "int32": int, "uint64": int}

# Name → Python type. An option is a sequence of at most one value: an empty one leaves it to the node's parameter.
OPTION_TYPES: dict[str, type] = {
    name: _PYTHON_TYPES[kind.removeprefix("sequence<").removesuffix(", 1>")]
    for name, kind in SamplingOptions.get_fields_and_field_types().items()
    if kind.endswith(", 1>")
}
