"""Writes the pages of docs/ that are made of something else.

backends.md, what each backend builds and runs, is made of what the backends themselves say; the others of measurements
(docs_results.py).

python3 tools/docs_tables.py            # write the pages
python3 tools/docs_tables.py --check    # exit status 1 if a page is not what would be written
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import docs_results  # noqa: E402
from docs_results import table  # noqa: E402
from engine_core.backends.capabilities import Capabilities, all_capabilities  # noqa: E402
from engine_core.formats.weight_formats import NAMES  # noqa: E402
from engine_core.models.families import FAMILIES, TEXT_PARTS  # noqa: E402
from engine_core.models.shapes import spec_of  # noqa: E402
from engine_core.models.spec import ModelSpec  # noqa: E402

PAGE = ROOT / "docs" / "backends.md"
# A model of each family with its configuration class's defaults for everything but the sizes.
SIZES = dict(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=12,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=512,
    full_attn_idxs=[2, 5, 8],  # the others have short convolutions, where the family has such
)
CONTEXT = 4096
HEAD = """# What each backend runs

`tools/docs_tables.py` writes this page from `engine_core/backends/*/capabilities.py`, which `edgellm plan`, `build`,
`inspect` and `doctor` ask, too. Change it there; `make test` compares.
"""


def weights(backends: Sequence[Capabilities]) -> str:
    def cell(each: Capabilities, kind: str) -> str:
        return "yes" if kind in each.weight_formats else "–"

    rows = [[kind, *(cell(each, kind) for each in backends)] for kind in NAMES]
    return table(["`quantization`", *(each.backend for each in backends)], rows)


def kv_caches(backends: Sequence[Capabilities]) -> str:
    rows = []
    for each in backends:
        by_types: dict[tuple[str, ...], list[str]] = {}
        for kind in each.weight_formats:
            by_types.setdefault(each.kv_cache_types_for(None, kind), []).append(kind)
        rows += [[each.backend, ", ".join(kinds), ", ".join(types)] for types, kinds in by_types.items()]
    return table(["backend", "weights", "`kv_cache_type`, the default first"], rows)


def families(backends: Sequence[Capabilities]) -> str:
    def cell(each: Capabilities, spec: ModelSpec) -> str:
        if (reason := each.model_refusal(spec, CONTEXT)) is not None:
            return "no: " + reason.partition(" has ")[2].partition(",")[0]
        types = {each.kv_cache_types_for(spec, kind, CONTEXT) for kind in each.weight_formats}
        everywhere = {each.kv_cache_types_for(None, kind) for kind in each.weight_formats}
        return "yes" if types == everywhere else "yes, KV cache in the weights' type"

    return table(
        ["model", *(each.backend for each in backends)],
        [[f"`{spec.architecture}`", *(cell(each, spec) for each in backends)] for spec in specs()],
    )


def text_parts() -> str:
    """Return which models with images are run without them, and as what."""
    by_type = {family.model_type: family.architecture for family in FAMILIES}
    lines = [
        f"- `{part.architecture}`: {', '.join(f'`{by_type[kind]}`' for kind in part.text_types)}" for part in TEXT_PARTS
    ]
    return "Of these the text model is run, without images:\n\n" + "\n".join(lines)


def specs() -> list[ModelSpec]:
    eyes = {"patch_size": 16, "out_hidden_size": SIZES["hidden_size"], "deepstack_visual_indexes": []}
    rope = {"rope_type": "default", "mrope_section": [SIZES["head_dim"] // 2, 0, 0]}
    nested = {"text_config": {**SIZES, "rope_parameters": rope}, "vision_config": eyes, "image_token_id": 7}
    return [
        spec_of({**(nested if family.text_type else SIZES), "architectures": [family.architecture]})
        for family in FAMILIES
    ]


def limits(backends: Sequence[Capabilities]) -> str:
    def traits(each: Capabilities) -> str:
        labels = "; ".join(trait.label for trait in each.traits)
        labels = labels.replace("the activation {spec.activation}", "another activation than silu")
        return labels.replace("position {spec.query_scale_position}", "a position")

    def ordered(each: Capabilities) -> str:
        kept = [each.keeps_order(spec) for spec in specs() if each.model_refusal(spec, CONTEXT) is None]
        return "yes" if all(kept) else "in most models" if any(kept) else "no"

    rows = {
        "runs on": lambda each: "an NVIDIA GPU" if each.on_gpu else "the CPU",
        "oldest GPU": lambda each: f"sm_{each.least_capability}" if each.least_capability else "–",
        "`max_context` unless asked for": lambda each: f"the model's, at most {each.longest_default}",
        "`max_context` is a multiple of": lambda each: str(each.context_step),
        "`max_batch`, at most": lambda each: str(each.max_batch),
        "`--group-size` of integers": lambda each: ", ".join(map(str, each.group_sizes)) or "–",
        "own values of GPTQ with act-order (`desc_act`)": ordered,
        "LoRA adapters at run time": lambda each: "yes" if each.lora else "no",
        "speculation": lambda each: "yes" if each.drafts else "not yet",
        "perplexity (`edgellm evaluate`)": lambda each: "yes" if each.log_probabilities else "no",
        "LongRoPE's factors by each sequence's length": lambda each: "yes" if each.switches_rope else "no",
        "CUDA graphs": lambda each: "yes" if each.cuda_graphs else "no",
        "models it does not run have": traits,
    }
    return table(
        ["", *(each.backend for each in backends)],
        [[name, *(of(each) for each in backends)] for name, of in rows.items()],
    )


def backends_page() -> str:
    """Return docs/backends.md."""
    backends = list(all_capabilities())
    parts = [
        HEAD,
        "## Weights\n",
        weights(backends) + "\n",
        "## KV caches\n",
        kv_caches(backends) + "\n",
        f"## Models\n\nWith their configuration class's defaults, `max_context` {CONTEXT} and fitting sizes:\n",
        families(backends) + "\n",
        text_parts() + "\n",
        "## Limits\n",
        limits(backends) + "\n",
    ]
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is not up to date")
    check = parser.parse_args().check
    pages = {PAGE: backends_page(), **docs_results.pages()}
    changed = [path for path, text in pages.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in changed:
        print(f"{path.relative_to(ROOT)} {'is not up to date' if check else 'written'}")
        if not check:
            path.write_text(pages[path], encoding="utf-8")
    return 1 if check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
