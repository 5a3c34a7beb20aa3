"""Small chat templates that write tools, calls and reasoning as public model families do, and tokenizers for them."""

from __future__ import annotations

import json

import fakes
from engine_core.text.tokenizer import Tokenizer

_QWEN_TURNS = (
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}CALL{% if not loop.last %}\n{% endif %}{% endfor %}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
_HERMES_CALL = (
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
)
_JSON_CALLS = (
    "{% for c in m.tool_calls %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}ID}'
    "{% if not loop.last %}, {% endif %}{% endfor %}"
)
_XML_CALL = (
    "<tool_call>\n<function={{ c.function.name }}>\n{% for k, v in c.function.arguments | items %}<parameter={{ k }}>\n"
    "{{ v if v is string else v | tojson }}\n</parameter>\n{% endfor %}</function>\n</tool_call>"
)
_DEEPSEEK_CALLS = (
    "<｜tool▁calls▁begin｜>{% for c in m.tool_calls %}"
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ c.function.name }}\n"
    "```json\n{{ c.function.arguments | tojson }}\n```<｜tool▁call▁end｜>"
    "{% if not loop.last %}\n{% endif %}{% endfor %}"
    "<｜tool▁calls▁end｜>"
)
_GEMMA = (
    "{% macro value(v) %}{% if v is string %}<escape>{{ v }}<escape>{% elif v is mapping %}"
    "{{ '{' }}{% for k, w in v | dictsort %}{{ k }}:{{ value(w) }}{% if not loop.last %},{% endif %}{% endfor %}"
    "{{ '}' }}{% elif v is sequence %}[{% for w in v %}{{ value(w) }}{% if not loop.last %},{% endif %}{% endfor %}]"
    "{% else %}{{ v | tojson }}{% endif %}{% endmacro %}"
    "{% if tools %}<start_of_turn>developer\n{% for t in tools %}<start_function_declaration>{{ t.function.name }}"
    "<end_function_declaration>{% endfor %}<end_of_turn>\n{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "<start_function_call>call:{{ c.function.name }}{{ value(c.function.arguments) }}<end_function_call>{% endfor %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def _turns(calls: str, tools: str, end: str = "<end>", tool: str = "{{ m.content }}") -> str:
    return (
        f"{tools}{{% for m in messages %}}[{{{{ m.role }}}}]{{% if m.role == 'tool' %}}{tool}{{% else %}}"
        f"{{{{ m.content or '' }}}}{{% endif %}}{{% if m.tool_calls %}}{calls}{{% endif %}}{end}{{% endfor %}}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )


_TOOLS = "{% if tools %}[tools]{{ tools | tojson }}[/tools]{% endif %}"
_MISTRAL_ID = ', "id": "{{ c.id }}"'
_MISTRAL = (
    "{% for c in m.tool_calls %}{% if c.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}"
    "{% endfor %}[TOOL_CALLS]["
)
_MISTRAL_ANSWER = '[TOOL_RESULTS]{"content": {{ m.content }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]'
_LLAMA = (
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('This model only supports single tool-calls at once!') }}"
    '{% endif %}{% set c = m.tool_calls[0] %}{"name": "{{ c.function.name }}", "parameters": '
    "{{ c.function.arguments | tojson }}}"
)

# Format → (template, its markers).
TEMPLATES: dict[str, tuple[str, tuple[str, ...]]] = {
    "hermes": (
        f"{_TOOLS}<tool_call></tool_call>{_QWEN_TURNS.replace('CALL', _HERMES_CALL)}",
        ("<tool_call>", "</tool_call>", "<think>", "</think>"),
    ),
    "qwen3_coder": (
        f"{_TOOLS}{_QWEN_TURNS.replace('CALL', _XML_CALL)}",
        ("<tool_call>", "</tool_call>", "<think>", "</think>"),
    ),
    "mistral": (
        _turns(f"{_MISTRAL}{_JSON_CALLS.replace('ID', _MISTRAL_ID)}]", _TOOLS, tool=_MISTRAL_ANSWER),
        ("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    ),
    "mistral_args": (
        _turns(
            "{% for c in m.tool_calls %}[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}"
            "{% endfor %}",
            _TOOLS,
        ),
        ("[TOOL_CALLS]", "[ARGS]"),
    ),
    "llama3": (
        _turns(_LLAMA, f"{_TOOLS}{{# ipython #}}") + '{# "parameters": #}',
        ("<|python_tag|>",),
    ),
    "phi4_mini": (
        _turns("", "{% if tools %}<|tool|>{{ tools | tojson }}<|/tool|>{% endif %}"),
        ("<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>"),
    ),
    "granite": (
        _turns(f"<|tool_call|>[{_JSON_CALLS.replace('ID', '')}]", _TOOLS),
        ("<|tool_call|>",),
    ),
    "nemotron": (
        _turns(f"<TOOLCALL>[{_JSON_CALLS.replace('ID', '')}]</TOOLCALL>", _TOOLS),
        (),
    ),
    "deepseek": (
        _turns(_DEEPSEEK_CALLS, _TOOLS) + "{% if add_generation_prompt %}<think>\n{% endif %}",
        ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
         "<｜tool▁sep｜>", "<think>", "</think>"),
    ),
    "functiongemma": (
        _GEMMA,
        ("<start_function_call>", "<end_function_call>", "<escape>", "<start_of_turn>", "<end_of_turn>"),
    ),
}  # fmt: skip


def write(directory, template: str, markers: tuple[str, ...] = ()) -> Tokenizer:
    """The byte tokenizer of the fakes with a template and further tokens for its markers, from id 259 on."""
    directory.mkdir(parents=True, exist_ok=True)
    fakes.write_tokenizer(directory)
    values = json.loads((directory / "tokenizer.json").read_text())
    for content in markers:
        index = 256 + len(values["added_tokens"])
        values["added_tokens"].append(dict(values["added_tokens"][0], id=index, content=content, special=False))
    (directory / "tokenizer.json").write_text(json.dumps(values))
    (directory / "chat_template.jinja").write_text(template)
    return Tokenizer(directory)
