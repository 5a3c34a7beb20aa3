"""A few answers of a real model, judged by benchmarks/real_model_checks.py; EDGELLM_REAL_ENGINE names its engine."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ENGINE = os.environ.get("EDGELLM_REAL_ENGINE")
if not ENGINE:
    pytest.skip("EDGELLM_REAL_ENGINE names no engine directory of a real model", allow_module_level=True)
pytest.importorskip("jsonschema")
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import real_model_checks  # noqa: E402


@pytest.fixture(scope="module")
def client():
    made = real_model_checks.open_client(Path(ENGINE), threads=1)
    yield made
    real_model_checks.close_client(made)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("case", real_model_checks.CASES)
def test_every_answer_is_right(client, case, temperature):
    judged = real_model_checks.CASES[case].run(client, temperature, 1000)
    assert judged.answers and not judged.wrong
