"""Signed engine directories: what a trusted key has not signed is refused, and keys are read as tools write them."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from functools import partial

import pytest

from engine_core.cli import main
from engine_core.config import EngineConfig
from engine_core.errors import BuildError, ConfigurationError, IntegrityError, SignatureError
from engine_core.formats.manifest import (
    MANIFEST_NAME,
    Manifest,
    find_variants,
    read_manifest,
    seal,
    write_variant,
)
from engine_core.formats.signatures import read_signing_key, read_trusted_keys
from engine_core.planning.selection import choose
from fakes import END, EOS, fake_model

pytest.importorskip("cryptography")
from cryptography.hazmat.primitives import serialization as files  # noqa: E402
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key  # noqa: E402
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: E402

SIGNATURE_NAME = "engine.json.sig"
MANIFEST = Manifest("fake", fake_model(), "onnxruntime", "fp32", "fp32", 512, 1, (EOS, END))
PLAIN = files.NoEncryption()


def private_pem(key, encryption=PLAIN) -> bytes:
    return key.private_bytes(files.Encoding.PEM, files.PrivateFormat.PKCS8, encryption)


def public(key, encoding=files.Encoding.OpenSSH, form=files.PublicFormat.OpenSSH) -> bytes:
    return key.public_key().public_bytes(encoding, form)


@pytest.fixture
def keys(tmp_path):
    """Two key pairs: ``mine``, ``mine.pub``, ``other``, ``other.pub``; and the directory ``trusted`` with mine.pub."""
    folder = tmp_path / "keys"
    (folder / "trusted").mkdir(parents=True)
    for name in ("mine", "other"):
        key = Ed25519PrivateKey.generate()
        (folder / name).write_bytes(private_pem(key))
        (folder / f"{name}.pub").write_bytes(public(key) + b" me@here\n")
    shutil.copy(folder / "mine.pub", folder / "trusted")
    return folder


def write(directory, **changes):
    with write_variant(directory) as temporary:
        (temporary / "model.onnx").write_bytes(b"graph" + changes.get("quantization", "").encode())
        (temporary / "sub").mkdir()
        (temporary / "sub" / "weights").write_bytes(bytes(10))
        seal(temporary, dataclasses.replace(MANIFEST, **changes))
    return directory


@pytest.fixture
def signed(tmp_path, keys):
    directory = write(tmp_path / "engine")
    assert main(["sign", str(directory), "--key", str(keys / "mine")]) == 0
    return directory


def opened(directory, trusted) -> Manifest:
    return read_manifest(directory, trusted=read_trusted_keys(trusted))


def test_what_a_trusted_key_has_signed_is_taken(signed, keys):
    for trusted in (keys / "mine.pub", keys / "trusted"):
        assert opened(signed, trusted).model_name == "fake"
    assert opened(signed, "").model_name == "fake"  # none is asked for


def replace_with_other(signed, keys):
    key = read_signing_key(keys / "other", lambda: "")
    key.sign(signed / MANIFEST_NAME, (signed / MANIFEST_NAME).read_bytes())


def swap(signed, keys):
    """The signature of another engine by the same key."""
    other = write(signed.parent / "second", quantization="int8")
    assert main(["sign", str(other), "--key", str(keys / "mine")]) == 0
    shutil.copy(other / SIGNATURE_NAME, signed)


def change_manifest(signed, keys):
    path = signed / MANIFEST_NAME
    path.write_bytes(path.read_bytes() + b" ")


def resize(size):
    def change(signed, keys):
        path = signed / SIGNATURE_NAME
        path.write_bytes((path.read_bytes() * 2)[:size])

    return change


def make_pipe(signed, keys):
    (signed / SIGNATURE_NAME).unlink()
    os.mkfifo(signed / SIGNATURE_NAME)


def change_file(signed, keys):
    (signed / "model.onnx").write_bytes(b"grapH")


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        (lambda signed, keys: (signed / SIGNATURE_NAME).unlink(), "is not signed: engine.json.sig cannot be read"),
        (replace_with_other, "is no signature of engine.json by a key of"),
        (swap, "is no signature of engine.json by a key of"),
        (change_manifest, "is no signature of engine.json by a key of"),
        (resize(63), "has 63 bytes, but an Ed25519 signature has 64"),
        (resize(0), "has 0 bytes"),
        (resize(65), "has more than 64 bytes"),
        (change_file, "model.onnx has SHA-256"),
        (lambda signed, keys: (signed / "sub" / "extra.so").write_bytes(b"x"), "is not listed in engine.json, but it"),
        (lambda signed, keys: (signed / "link").symlink_to(keys), "is not listed in engine.json, but it"),
        (make_pipe, "has 0 bytes"),  # nobody writes to it
    ],
)
def test_what_was_changed_is_refused_with_one_sentence(signed, keys, capsys, attack, words):
    attack(signed, keys)
    with pytest.raises(IntegrityError, match=words):
        choose(EngineConfig(signed, trusted_keys=str(keys / "trusted")))
    for command in (["inspect", "--trusted-keys"], ["serve", "--port", "0", "--trusted-keys"]):
        assert main([command[0], str(signed), *command[1:], str(keys / "mine.pub")]) == 1
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def test_a_manifest_is_not_parsed_before_its_signature_is_verified(signed, keys):
    (signed / MANIFEST_NAME).write_text("[" * 100_000)
    with pytest.raises(SignatureError):
        opened(signed, keys / "mine.pub")


def test_what_is_parsed_is_what_was_verified(signed, keys, monkeypatch):
    """Whoever changes the file after it was read changes nothing."""
    trusted, path = read_trusted_keys(keys / "mine.pub"), signed / MANIFEST_NAME
    verify = type(trusted).verify

    def verify_and_change(self, *arguments):
        verify(self, *arguments)
        path.write_text(dataclasses.replace(MANIFEST, model_name="another").to_json())

    monkeypatch.setattr(type(trusted), "verify", verify_and_change)
    assert read_manifest(signed, trusted=trusted).model_name == "fake"
    with pytest.raises(SignatureError):
        read_manifest(signed, trusted=trusted)


def test_no_variant_hides_an_unsigned_one(tmp_path, keys):
    for kind in ("int8", "fp32"):
        write(tmp_path / "both" / kind, quantization=kind)
    assert main(["sign", str(tmp_path / "both" / "int8"), "--key", str(keys / "mine")]) == 0
    trusted = read_trusted_keys(keys / "mine.pub")
    with pytest.raises(SignatureError, match="fp32/engine.json is not signed"):
        find_variants(tmp_path / "both", trusted)
    assert main(["sign", str(tmp_path / "both"), "--key", str(keys / "mine")]) == 0
    assert len(find_variants(tmp_path / "both", trusted)) == 2


def test_building_again_leaves_no_signature(signed, keys):
    write(signed, quantization="int8")
    assert not (signed / SIGNATURE_NAME).exists()


def test_a_damaged_engine_is_not_signed(tmp_path, keys, capsys):
    directory = write(tmp_path / "engine")
    change_file(directory, keys)
    assert main(["sign", str(directory), "--key", str(keys / "mine")]) == 1
    assert "model.onnx has SHA-256" in capsys.readouterr().err
    assert not (directory / SIGNATURE_NAME).exists()


def test_a_variant_that_cannot_be_signed_is_named(tmp_path, keys, capsys):
    """It would be refused for its missing signature afterwards."""
    write(tmp_path / "both" / "fp32")
    path = write(tmp_path / "both" / "int8", quantization="int8") / MANIFEST_NAME
    path.write_text(path.read_text().replace('"schema_version": 2', '"schema_version": 1'))
    assert main(["sign", str(tmp_path / "both"), "--key", str(keys / "mine")]) == 1
    assert "int8/engine.json has schema version 1" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_a_checkpoint_is_not_signed(tmp_path, keys, capsys, command):
    (tmp_path / "config.json").write_text("{}")
    assert main([command, str(tmp_path), "--trusted-keys", str(keys / "mine.pub")]) == 1
    assert "is a checkpoint, which is not signed" in capsys.readouterr().err


def test_sizes_alone_prove_nothing():
    with pytest.raises(ConfigurationError, match="trusted_keys needs verify_files"):
        EngineConfig("engine", trusted_keys="keys", verify_files=False)


@pytest.mark.parametrize("program", ["ssh-keygen", "openssl"])
def test_keys_of_other_programs(tmp_path, program):
    """Both sign; what openssl signs and verifies is the same."""
    if shutil.which(program) is None:
        pytest.skip(f"there is no {program}")
    key, pub = tmp_path / "key", tmp_path / "key.pub"

    def call(*arguments) -> None:
        subprocess.run([program, *map(str, arguments)], check=True, capture_output=True)

    directory = write(tmp_path / "engine")
    if program == "ssh-keygen":
        call("-q", "-t", "ed25519", "-N", "", "-f", key)
        shown = subprocess.run([program, "-l", "-f", key], capture_output=True, text=True, check=True).stdout
        assert read_signing_key(key, lambda: "").fingerprint == shown.split()[1]
    else:
        call("genpkey", "-algorithm", "ed25519", "-out", key)
        call("pkey", "-in", key, "-pubout", "-out", pub)
    assert main(["sign", str(directory), "--key", str(key)]) == 0
    assert opened(directory, pub).model_name == "fake"
    if program == "openssl":
        options = ("-rawin", "-in", directory / MANIFEST_NAME, "-inkey")
        call("pkeyutl", "-verify", "-pubin", *options, pub, "-sigfile", directory / SIGNATURE_NAME)
        (directory / SIGNATURE_NAME).unlink()
        call("pkeyutl", "-sign", *options, key, "-out", directory / SIGNATURE_NAME)
        assert opened(directory, pub).model_name == "fake"


def test_a_passphrase_is_asked_for(tmp_path, keys, capsys):
    secret = Ed25519PrivateKey.generate()
    path = tmp_path / "secret.pem"
    path.write_bytes(private_pem(secret, files.BestAvailableEncryption(b"open sesame")))
    assert public(read_signing_key(path, lambda: "open sesame").key) == public(secret)
    for wrong in ("sesame", ""):
        with pytest.raises(BuildError, match="The passphrase of .* is not right"):
            read_signing_key(path, partial(str, wrong))
    directory = write(tmp_path / "engine")
    assert main(["sign", str(directory), "--key", str(path)]) == 1  # there is no terminal
    assert "has a passphrase" in capsys.readouterr().err


def test_a_passphrase_of_ssh_keygen_is_asked_for(tmp_path):
    """Not every version of the package can decrypt it."""
    if shutil.which("ssh-keygen") is None:
        pytest.skip("there is no ssh-keygen")
    path, asked = tmp_path / "key", []
    options = ("-q", "-t", "ed25519", "-N", "open sesame", "-a", "1", "-f", path)
    subprocess.run(["ssh-keygen", *map(str, options)], check=True)
    try:
        key = read_signing_key(path, lambda: asked.append(1) or "open sesame")
        assert path.with_suffix(".pub").read_bytes().startswith(public(key.key))
    except BuildError as error:
        assert "cannot be decrypted here" in str(error)
    assert asked


@pytest.mark.parametrize("content", [b"", b"hello", b"-----BEGIN PRIVATE KEY-----\nx\n-----END PRIVATE KEY-----\n"])
def test_what_is_no_private_key(tmp_path, content):
    path = tmp_path / "key"
    path.write_bytes(content)
    with pytest.raises(BuildError, match="is no Ed25519 private key; make one with ssh-keygen"):
        read_signing_key(path, lambda: "")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has no public keys"),
        (b"# nothing\n\n", "has no public keys"),
        (b"ssh-ed25519 AAAA me\n", "no Ed25519 public key"),
        (b"hello\n", "no Ed25519 public key"),
        (private_pem(Ed25519PrivateKey.generate()), "has a private key"),
        (public(generate_private_key(SECP256R1())), "another kind than Ed25519"),
    ],
)
def test_files_that_name_no_trusted_keys(tmp_path, content, words):
    path = tmp_path / "keys.pub"
    path.write_bytes(content)
    for trusted in (path, tmp_path):
        with pytest.raises(ConfigurationError, match=words):
            read_trusted_keys(trusted)


def test_several_keys_in_one_file(tmp_path, signed, keys):
    pem = public(Ed25519PrivateKey.generate(), files.Encoding.PEM, files.PublicFormat.SubjectPublicKeyInfo)
    path = tmp_path / "all.pub"
    path.write_bytes(b"# ours\n" + pem + (keys / "other.pub").read_bytes() + (keys / "mine.pub").read_bytes())
    assert len(read_trusted_keys(path).keys) == 3
    assert opened(signed, path).model_name == "fake"


def test_keys_that_everyone_can_change_are_not_trusted(keys):
    (keys / "mine.pub").chmod(0o666)
    with pytest.raises(ConfigurationError, match="can be changed by all users"):
        read_trusted_keys(keys / "mine.pub")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_trusted_keys(keys / "missing")
