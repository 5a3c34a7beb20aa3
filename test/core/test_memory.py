from __future__ import annotations

import pytest

from engine_core.errors import InsufficientMemoryError
from engine_core.memory import MemoryItem, MemoryPlan, format_bytes, kv_cache_bytes

GIB = 2**30
TEXTBOOK = dict(num_layers=32, num_kv_heads=8, head_dim=128, max_context=4096, max_batch=4)


def test_the_textbook_kv_cache():
    """32 layers × batch 4 × 2 × 8 heads × 4,096 × 128 × 2 bytes = 2 GiB; half the context, half the bytes."""
    assert kv_cache_bytes(**TEXTBOOK, kv_cache_type="fp16") == 2 * GIB
    assert kv_cache_bytes(**{**TEXTBOOK, "max_context": 2048}, kv_cache_type="fp16") == GIB
    assert kv_cache_bytes(**TEXTBOOK, kv_cache_type="fp32") == 4 * GIB
    # int8 and fp8: one byte a value and an fp16 scale for each vector of 128
    for kind in ("int8", "fp8"):
        assert kv_cache_bytes(**TEXTBOOK, kv_cache_type=kind) == GIB + 2 * GIB // 128
    # or a float32 for each of 32 × 2 × 8 × 128 channels
    assert kv_cache_bytes(**TEXTBOOK, kv_cache_type="int8", int8_scales="channel") == GIB + 4 * 65536


def test_a_plan_that_does_not_fit_is_refused_with_its_numbers():
    plan = MemoryPlan((MemoryItem("weights", 3 * GIB), MemoryItem("kv_cache", 2 * GIB)), 4 * GIB, "GPU 0")
    assert plan.total == 5 * GIB and plan.item("weights") == 3 * GIB and plan.item("rope") == 0
    with pytest.raises(InsufficientMemoryError) as raised:
        plan.check("max_context 1024 would fit")
    for words in ("5.00 GiB", "weights 3.00 GiB", "kv_cache 2.00 GiB", "GPU 0 has 4.00 GiB free", "1024 would fit"):
        assert words in str(raised.value)
    MemoryPlan(plan.items, 5 * GIB, "GPU 0").check()
    assert "total" in plan.table() and "5.00 GiB" in plan.table()


def test_what_lies_on_the_host_is_counted_against_the_host():
    plan = MemoryPlan.of({"weights": 2 * GIB}, 4 * GIB, "GPU 0", {"prefix_cache": 3 * GIB}, 3 * GIB)
    assert (plan.total, plan.host_total, plan.item("prefix_cache")) == (2 * GIB, 3 * GIB, 3 * GIB)
    plan.check()
    assert "prefix_cache (host)" in plan.table() and "free (host)" in plan.table()
    with pytest.raises(InsufficientMemoryError, match=r"3.00 GiB of the host's memory.* lower session_memory"):
        MemoryPlan.of({"weights": GIB}, 4 * GIB, "GPU 0", {"prefix_cache": 3 * GIB}, 2 * GIB).check()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (5 * 2**20, "5.00 MiB"), (2**41, "2048.00 GiB")],
)
def test_bytes_are_readable(count, text):
    assert format_bytes(count) == text
