"""``edgellm get``: from a local hub directory or a hub on the network to an engine that answers; and its refusals."""

from __future__ import annotations

import errno
import json
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

import fake_hub
from engine_core import cli
from engine_core.errors import DownloadError
from engine_core.formats.manifest import read_manifest
from engine_core.hub import download, resume

pytest.importorskip("huggingface_hub")
import huggingface_hub  # noqa: E402

MODEL = "Qwen/Qwen3-0.6B"
NAME = "qwen3-0.6b"
PINNED = "c1899de289a04d12100db370d81485cdf75e47ca"
NO_CHECK = ("--no-check", "--variant", "int4")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return fake_hub.write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def network(checkpoint, tmp_path, monkeypatch):
    """A hub on the network with the tiny model, and an empty cache."""
    hub = fake_hub.FakeHub()
    hub.models["tiny/model"] = checkpoint
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)  # made of HF_ENDPOINT at the import
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("EDGELLM_HUB", raising=False)
    yield hub
    hub.close()


def get(capsys, *arguments) -> tuple[int, str, str]:
    status = cli.main(["get", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def refusal(capsys, *arguments) -> str:
    """Return the one sentence of a command that failed."""
    status, _, err = get(capsys, *arguments)
    assert status == 1 and err.count("\n") == 1 and err.startswith("edgellm: ") and err.endswith(".\n")
    return err


# --- a local hub directory --------------------------------------------------------------------------------


def test_a_directory_of_checkpoints_becomes_an_engine_that_answers(checkpoint, tmp_path, capsys, monkeypatch):
    (tmp_path / "hub" / "Qwen").mkdir(parents=True)
    (tmp_path / "hub" / MODEL).symlink_to(checkpoint)
    monkeypatch.setenv("EDGELLM_HUB", str(tmp_path / "hub"))
    monkeypatch.setenv("HOME", str(tmp_path))
    status, out, err = get(capsys, NAME)
    engine = tmp_path / "engines" / NAME
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == f"ros2 launch edgellm_ros llm.launch.py engine_dir:={engine}"
    assert "tokens/s" in out and "no recorded hashes" in out
    manifest = read_manifest(engine)
    assert (manifest.model_name, manifest.backend, manifest.max_context) == (NAME, "onnxruntime", 256)
    assert manifest.quantization in ("int8", "int4")
    assert "is not empty" in refusal(capsys, NAME)
    assert get(capsys, NAME, "--force", *NO_CHECK)[0] == 0
    assert read_manifest(engine).quantization == "int4"


@pytest.mark.parametrize("folder", ["", "hub"])
def test_a_cache_is_checked_against_its_hashes(checkpoint, tmp_path, capsys, folder):
    cache = tmp_path / "home" / folder
    repository = fake_hub.write_cache(cache, MODEL, checkpoint, PINNED)
    arguments = (NAME, "--hub", tmp_path / "home", *NO_CHECK)
    status, out, _ = get(capsys, *arguments[:1], tmp_path / "engine", *arguments[1:])
    assert status == 0 and f"{len(list(checkpoint.iterdir()))} files have the hashes" in out
    weights = repository / "snapshots" / PINNED / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    err = refusal(capsys, *arguments[:1], tmp_path / "other", *arguments[1:])
    assert "model.safetensors" in err and "does not have the hash" in err
    assert weights.is_file() and not (tmp_path / "other").exists()


def test_another_revision_is_named(checkpoint, tmp_path, capsys):
    fake_hub.write_cache(tmp_path / "hub", MODEL, checkpoint)
    err = refusal(capsys, NAME, tmp_path / "engine", "--hub", tmp_path / "hub")
    assert PINNED in err and fake_hub.COMMIT in err and "--revision" in err
    named = (NAME, tmp_path / "engine", "--hub", tmp_path / "hub", "--revision", "main", *NO_CHECK)
    assert get(capsys, *named)[0] == 0


@pytest.mark.parametrize("commit", ["", ".", "..", "../../elsewhere"])
def test_a_snapshot_outside_its_place_is_not_taken(tmp_path, commit):
    snapshots = tmp_path / "models--tiny--model" / "snapshots"
    (snapshots / fake_hub.COMMIT).mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (snapshots.parent / "refs").mkdir()
    (snapshots.parent / "refs" / "main").write_text(commit)
    for model in (download.HubModel("tiny/model"), download.HubModel("tiny/model", commit)):
        with pytest.raises(DownloadError, match=f"only {fake_hub.COMMIT}"):
            download.find_local(tmp_path, model)


def test_a_small_file_has_the_hash_of_git(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"hello\n")
    assert fake_hub.git_hash(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object
    blob = tmp_path / "blobs" / fake_hub.git_hash(b"hello\n")
    blob.parent.mkdir()
    path.rename(blob)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "file").symlink_to(blob)
    (tmp_path / "snapshot" / "circle").symlink_to("circle")
    assert download.verify(tmp_path / "snapshot") == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("nosuchmodel",), ("neither a known model", "edgellm recommend")),
        (("qwen3-0.7b",), ("close to it are", "qwen3-0.6b")),
        ((NAME, "--hub", "/nonexistent"), ("/nonexistent does not exist",)),
        ((NAME, "--variant", "int4_awq"), ("needs calibration texts", "edgellm quantize")),
        (("some/other", "--hub", "HUB"), ("has no some/other",)),
        ((NAME, "--hub", "HUB", "--variant", "fp8"), ("fp8",)),
    ],
)
def test_what_cannot_be_had_is_refused_with_one_sentence(checkpoint, tmp_path, capsys, arguments, words):
    (tmp_path / "hub" / "Qwen").mkdir(parents=True)
    (tmp_path / "hub" / MODEL).symlink_to(checkpoint)
    given = [tmp_path / "hub" if each == "HUB" else each for each in arguments]
    err = refusal(capsys, given[0], tmp_path / "engine", *given[1:])
    assert all(word in err for word in words)
    assert not (tmp_path / "engine").exists()


def test_a_family_that_is_not_supported_is_refused_before_the_weights(tmp_path, capsys, network):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"architectures": ["MambaForCausalLM"]}))
    network.models["other/model"] = other
    assert "MambaForCausalLM is not supported" in refusal(capsys, "other/model", tmp_path / "engine")
    assert network.ranges == []


def test_a_model_that_does_not_fit_is_refused_before_the_weights(tmp_path, capsys, network, monkeypatch):
    monkeypatch.setattr("engine_core.host_memory.available_memory", lambda: 1 << 20)
    err = refusal(capsys, "tiny/model", tmp_path / "engine")
    assert "free" in err and "edgellm recommend" in err
    assert network.ranges == []


# --- a hub on the network ---------------------------------------------------------------------------------


def test_a_model_of_the_hub_is_downloaded_checked_and_built(tmp_path, capsys, network, checkpoint):
    pinned = ("--revision", fake_hub.COMMIT, *NO_CHECK)
    status, out, err = get(capsys, "tiny/model", tmp_path / "engine", *pinned)
    assert (status, err) == (0, "")
    assert f"{len(list(checkpoint.iterdir()))} files have the hashes" in out
    assert network.ranges == [None]
    assert get(capsys, "tiny/model", tmp_path / "main", *NO_CHECK)[0] == 0
    assert len(network.ranges) == 1  # from the cache
    network.models.clear()
    assert get(capsys, "tiny/model", tmp_path / "again", *pinned)[0] == 0  # the hub is not asked


def test_an_interrupted_download_goes_on_where_it_stopped(tmp_path, capsys, network):
    network.broken_after = 100_000
    err = refusal(capsys, "tiny/model", tmp_path / "engine", *NO_CHECK)
    assert "download of tiny/model failed" in err and "where it stopped" in err
    assert not (tmp_path / "engine").exists()
    network.broken_after = None
    network.ranges.clear()
    assert get(capsys, "tiny/model", tmp_path / "engine", *NO_CHECK)[0] == 0
    assert network.ranges == ["bytes=100000-"]


def test_a_hash_that_leads_out_of_the_cache_is_refused(monkeypatch):
    entry = SimpleNamespace(path="model.safetensors", lfs=SimpleNamespace(size=1, sha256="../../elsewhere"))
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_tree", lambda *_, **__: [entry])
    with pytest.raises(DownloadError, match="as the SHA-256 of model.safetensors"):
        resume.large_files("tiny/model", "main", ".safetensors")


def test_ctrl_c_says_how_to_go_on(tmp_path, capsys, network, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub, "snapshot_download", interrupted)
    status, _, err = get(capsys, "tiny/model", tmp_path / "engine")
    assert status == 130 and "goes on where the download stopped" in err


def test_a_damaged_download_is_removed_and_fetched_again(tmp_path, capsys, network):
    network.damaged = True
    err = refusal(capsys, "tiny/model", tmp_path / "engine", *NO_CHECK)
    assert "does not have the hash" in err and "it was removed" in err
    network.damaged = False
    assert get(capsys, "tiny/model", tmp_path / "engine", *NO_CHECK)[0] == 0


def test_refusals_of_the_hub_are_one_sentence(tmp_path, capsys, network):
    network.gated.add("closed/model")
    network.models["closed/model"] = network.models["tiny/model"]
    err = refusal(capsys, "closed/model", tmp_path / "engine")
    assert "gated" in err and "https://huggingface.co/closed/model" in err and "hf auth login" in err
    assert "no model tiny/nosuch" in refusal(capsys, "tiny/nosuch", tmp_path / "engine")
    err = refusal(capsys, "tiny/model", tmp_path / "engine", "--revision", "v9")
    assert "no revision v9 of tiny/model" in err


def test_without_the_network_the_sentence_says_so(tmp_path, capsys, network, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    err = refusal(capsys, "tiny/model", tmp_path / "engine")
    assert "HF_HUB_OFFLINE" in err and "--hub or EDGELLM_HUB" in err


def test_a_full_disk_is_told_before_and_during_the_download(tmp_path, capsys, network, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "snapshot_download", full)
        assert "The disk is full" in refusal(capsys, "tiny/model", tmp_path / "engine")
    usage = namedtuple("usage", "total used free")(10, 10, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    err = refusal(capsys, "tiny/model", tmp_path / "engine")
    assert "0 B free" in err and "HF_HOME" in err
    assert network.ranges == []
