"""benchmarks/gpu_rows.py on a driver in host memory: the steps that it times are those of the backend."""

from __future__ import annotations

import json

import pytest

from benchmarks import gpu_decode, gpu_rows
from benchmarks.gpu_decode import Shape

TINY = Shape(1, 64, 96, 2, 1, 32, 320, True)


def test_each_step_is_timed_beside_one_row(driver, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(gpu_rows.SHAPES, "llama-3.2-1b", TINY)
    monkeypatch.setattr(gpu_decode, "BLOCK", 1 << 15)
    # The shortest of the three timed runs of a step counts.
    times = iter([ms for step in (9, 9, 2.0, 4.5) for ms in (step + 1, step, step + 2)])
    driver.milliseconds = lambda: next(times)
    output = tmp_path / "rows.jsonl"
    arguments = "--shapes llama-3.2-1b --weights fp16 --keys 20 --rows 4 --rounds 1 --output".split()
    gpu_rows.main([*arguments, str(output)])
    one, four = (json.loads(line) for line in output.read_text().splitlines())
    assert (one["gpu"], one["rows"], one["us_per_step"], one["ratio_to_one"]) == ("Fake GPU", 1, 2000, 1)
    assert (four["rows"], four["keys"], four["us_per_step"], four["ratio_to_one"]) == (4, 20, 4500, 2.25)
    assert next(times, None) is None and driver.used == 0
    assert "2.25" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--rows", "3"], ["--keys", "0"], ["--rounds", "0"]])
def test_odd_sizes_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        gpu_rows.main(arguments)
    assert "error" in capsys.readouterr().err
