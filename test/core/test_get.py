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
import fakes
from engine_core import cli
from engine_core.errors import DownloadError
from engine_core.formats.manifest import read_manifest
from engine_core.hub import download, resume
from engine_core.hub import gguf_files as gguf_files_of_hub

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
    assert status == 0 and [line.split()[0] for line in err.splitlines()] == ["Building"]
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


def test_a_checkpoint_that_is_here_is_for_build(tmp_path, capsys, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for model in ("owner/name", "./owner/name", tmp_path / "owner" / "name"):
        assert "is here already: 'edgellm build' makes an engine of it." in refusal(capsys, model)
    assert "is here already" not in refusal(capsys, "owner/name", "--hub", tmp_path)  # there it is what the id names


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


# --- GGUF files -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf_repository(checkpoint, tmp_path_factory) -> Path:
    """A repository as those of llama.cpp's users are."""
    pytest.importorskip("gguf")
    import gguf_files

    directory = tmp_path_factory.mktemp("gguf") / "tiny" / "Model-GGUF"
    directory.mkdir(parents=True)
    tokenizer = {"ggml.model": "gpt2", "ggml.pre": "gpt-2", "ggml.eos_token_id": 258}
    vocabulary = json.loads((checkpoint / "tokenizer.json").read_text())
    tokens = {**vocabulary["model"]["vocab"], **{each["content"]: each["id"] for each in vocabulary["added_tokens"]}}
    tokens["ab"] = len(tokens)  # a file without merges is none
    tokenizer["ggml.merges"] = ["a b"]
    assert len(tokens) == fakes.VOCAB_SIZE
    tokenizer["ggml.tokens"] = sorted(tokens, key=tokens.__getitem__)
    tokenizer["ggml.token_type"] = [1 if index < 256 else 3 for index in range(len(tokens))]
    for kind in ("Q8_0", "Q4_0"):
        gguf_files.write(directory / f"tiny-model-{kind.lower()}.gguf", checkpoint, kind, tokenizer=tokenizer)
    (directory / "mmproj-tiny-F16.gguf").write_bytes(b"GGUF")
    (directory / "README.md").write_text("Quantized with llama.cpp.")
    return directory


@pytest.mark.parametrize(
    "model, kind", [("tiny/Model-GGUF:q4_0", "int4"), ("tiny/Model-GGUF:tiny-model-q8_0.gguf", "int8")]
)
def test_a_gguf_file_of_a_directory_is_named_by_its_quantization(gguf_repository, tmp_path, capsys, model, kind):
    hub = gguf_repository.parent.parent
    status, out, err = get(capsys, model, tmp_path / "engine", "--hub", hub, "--variant", kind, "--no-check")
    assert status == 0, err
    manifest = read_manifest(tmp_path / "engine")
    assert (manifest.model_name, manifest.quantization) == ("model", kind)
    assert set(manifest.options["rounding_errors"]) <= {"embedding", "head"}, "its own values are kept"


def test_a_gguf_file_is_downloaded_alone_and_checked(gguf_repository, tmp_path, capsys, network):
    network.models["tiny/Model-GGUF"] = gguf_repository
    pinned = ("tiny/Model-GGUF:Q4_0", "--revision", fake_hub.COMMIT, *NO_CHECK)
    status, out, err = get(capsys, pinned[0], tmp_path / "engine", *pinned[1:])
    assert status == 0, err
    assert "1 files have the hashes" in out and network.ranges == [None]
    network.models.clear()
    assert get(capsys, pinned[0], tmp_path / "again", *pinned[1:])[0] == 0, "the hub is not asked"


def test_refusals_name_the_gguf_files_that_there_are(gguf_repository, tmp_path, capsys, network):
    network.models["tiny/Model-GGUF"] = gguf_repository
    asks = "tiny/Model-GGUF has GGUF files, in Q4_0, Q8_0; name one, such as tiny/Model-GGUF:Q4_0."
    for hub in ((), ("--hub", gguf_repository.parent.parent)):
        assert asks in refusal(capsys, "tiny/Model-GGUF", tmp_path / "engine", *hub)
        err = refusal(capsys, "tiny/Model-GGUF:Q5_K_M", tmp_path / "engine", *hub)
        assert "no GGUF file in 'Q5_K_M'; it has Q4_0, Q8_0." in err
    assert "none at all" in refusal(capsys, "tiny/model:Q4_0", tmp_path / "engine")
    path = next(gguf_repository.glob("tiny*"))
    assert "'edgellm build'" in refusal(capsys, path, tmp_path / "engine")
    assert network.ranges == []


def test_the_usual_names_of_gguf_files():
    names = ["a/B-UD-Q4_K_XL.gguf", "Q8_0/B-Q8_0-00001-of-00002.gguf", "Q8_0/B-Q8_0-00002-of-00002.gguf",
             "B.IQ4_XS.gguf", "b-fp16.gguf", "B-BF16.gguf", "B-1B.gguf", "mmproj-B-f16.gguf", "B.imatrix.gguf", "x.md",
             "two-Q5_0.gguf", "one-Q5_0.gguf", "part-Q2_K-00002-of-00003.gguf"]  # fmt: skip
    kinds = {gguf_files_of_hub.quantization_of(stem) for stem in gguf_files_of_hub.models_of(names)}
    assert kinds == {"UD-Q4_K_XL", "Q8_0", "IQ4_XS", "FP16", "BF16", "", "Q5_0", "Q2_K"}
    assert gguf_files_of_hub.choose(names, "q8_0", "x/y") == names[1:3]
    assert gguf_files_of_hub.choose(names, "B-1B", "x/y") == ["B-1B.gguf"]
    for wanted, sentence in (
        ("Q5_0", "2 GGUF models in Q5_0, one-Q5_0 and two-Q5_0"), ("Q2_K", "1 of the 3 parts"), ("Q9", "no GGUF file"),
    ):  # fmt: skip
        with pytest.raises(DownloadError, match=sentence):
            gguf_files_of_hub.choose(names, wanted, "x/y")


# --- a hub on the network ---------------------------------------------------------------------------------


def test_a_model_of_the_hub_is_downloaded_checked_and_built(tmp_path, capsys, network, checkpoint):
    pinned = ("--revision", fake_hub.COMMIT, *NO_CHECK)
    status, out, err = get(capsys, "tiny/model", tmp_path / "engine", *pinned)
    assert status == 0 and [line.split()[0] for line in err.splitlines()] == ["Building"]
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
    assert "did not arrive with the hash" in err and "it was removed" in err
    large = [path for path in tmp_path.rglob("blobs/*") if len(path.name.partition(".")[0]) == 64]
    assert not large  # neither whole nor in part
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
