"""Signatures of manifests: Ed25519 keys in the files of OpenSSH and OpenSSL, and what is signed with them.

The signature of a file is its 64 raw bytes, in a file beside it, over the bytes of the file: what
``openssl pkeyutl -sign -rawin`` writes. A manifest has the SHA-256 of every other file of its engine directory. Needs
the package cryptography.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine_core.errors import BuildError, ConfigurationError, SignatureError, first_line
from engine_core.formats.atomic import replaced_file
from engine_core.paths import expand_user

SIGNATURE_SUFFIX = ".sig"
_SIZE = 64  # bytes of a signature
_KEY_SUFFIXES = (".pub", ".pem")  # of the files of a directory of keys
_PEM = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----.*?-----END \1-----", re.DOTALL)


@dataclass(frozen=True)
class TrustedKeys:
    """Public keys of which one has to have signed."""

    path: Path  # of the file or directory that names them
    keys: tuple[Any, ...]  # Ed25519PublicKey

    def verify(self, path: Path, content: bytes) -> None:
        """Raises SignatureError unless the signature beside ``path`` is of ``content``, by one of the keys."""
        from cryptography.exceptions import InvalidSignature

        signature_path = signature_of(path)
        try:
            with open(signature_path, "rb", opener=_open_at_once) as file:
                signature = file.read(_SIZE + 1) or b""
        except OSError as error:
            raise SignatureError(
                f"{path} is not signed: {signature_path.name} cannot be read ({error.strerror}); sign the engine with "
                f"'edgellm sign', or leave trusted_keys empty."
            ) from error
        if len(signature) != _SIZE:
            found = f"{len(signature)}" if len(signature) < _SIZE else f"more than {_SIZE}"
            raise SignatureError(
                f"{signature_path} has {found} bytes, but an Ed25519 signature has {_SIZE}; copy or sign the engine "
                "again."
            )
        for key in self.keys:
            try:
                key.verify(signature, content)
            except InvalidSignature:
                continue
            return
        raise SignatureError(
            f"{signature_path} is no signature of {path.name} by a key of {self.path}; copy or sign the engine again, "
            "or add the public key of who made it."
        )


@dataclass(frozen=True)
class SigningKey:
    """A private key."""

    key: Any  # Ed25519PrivateKey

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the public key, as ``ssh-keygen -l`` shows it."""
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        text = self.key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        digest = hashlib.sha256(base64.b64decode(text.split()[1])).digest()
        return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"

    def sign(self, path: Path, content: bytes) -> None:
        """Write the signature of ``content`` beside ``path``. Raises OSError."""
        with replaced_file(signature_of(path)) as file:
            file.write_bytes(self.key.sign(content))


def _open_at_once(path: str, flags: int) -> int:
    """Open a file without waiting: a named pipe may have no writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def signature_of(path: Path) -> Path:
    """Return the path of the signature of a file."""
    return path.with_name(path.name + SIGNATURE_SUFFIX)


def read_trusted_keys(path: str | Path) -> TrustedKeys | None:
    """Return the keys of a file, or of the files NAME.pub and NAME.pem of a directory; None for an empty ``path``.

    A file has public keys in PEM, or one a line as OpenSSH writes them; lines that begin with # are skipped. Raises
    ConfigurationError, also for a file without keys, with a private or another kind of key, or that all users can
    change.
    """
    if not str(path):
        return None
    path = expand_user(path)
    _require_cryptography(ConfigurationError, "trusted_keys")
    try:
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix in _KEY_SUFFIXES and file.name[0] != ".")
        for each in dict.fromkeys([path, *files]):
            if each.stat().st_mode & 0o002:
                raise ConfigurationError(f"{each} can be changed by all users, so it names no trusted keys; chmod o-w.")
        keys = [key for file in files for key in _public_keys(file)]
    except OSError as error:
        raise ConfigurationError(f"The trusted keys {path} cannot be read ({error.strerror}).") from error
    if not keys:
        raise ConfigurationError(
            f"{path} has no public keys; name a file that has Ed25519 keys, or a directory of such files *.pub, *.pem."
        )
    return TrustedKeys(path, tuple(keys))


def _public_keys(path: Path) -> list[Any]:
    """Raises ConfigurationError, OSError."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key, load_ssh_public_key

    text = path.read_text(encoding="utf-8", errors="replace")
    if "PRIVATE KEY-----" in text:
        raise ConfigurationError(
            f"{path} has a private key; keep it where engines are signed, and name its public key."
        )
    lines = (line.strip() for line in _PEM.sub("", text).splitlines())
    found = []
    try:
        found += [load_pem_public_key(match[0].encode()) for match in _PEM.finditer(text)]
        found += [load_ssh_public_key(line.encode()) for line in lines if line and not line.startswith("#")]
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigurationError(
            f"{path} has something that is no Ed25519 public key ({first_line(error)}); take it away."
        ) from error
    if not all(isinstance(key, Ed25519PublicKey) for key in found):
        raise ConfigurationError(f"{path} has a key of another kind than Ed25519; make one with ssh-keygen -t ed25519.")
    return found


def read_signing_key(path: Path, passphrase: Callable[[], str]) -> SigningKey:
    """Return the private key of a file in PEM or of OpenSSH; ``passphrase`` is asked if it needs one.

    Raises BuildError, OSError.
    """
    _require_cryptography(BuildError, "Signing")
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

    content = path.read_bytes()
    load = load_ssh_private_key if b"OPENSSH PRIVATE KEY" in content else load_pem_private_key
    try:
        key = load(content, None)
    except (TypeError, ValueError, UnsupportedAlgorithm) as error:
        # Of an encrypted key: a TypeError, of OpenSSH's in older versions (3.4.8) a ValueError.
        if "password" not in str(error).lower():
            raise BuildError(f"{path} is no Ed25519 private key; make one with ssh-keygen -t ed25519.") from error
        try:
            key = load(content, passphrase().encode())
        except UnsupportedAlgorithm as lacking:  # OpenSSH's encryption needs the package bcrypt
            raise BuildError(f"{path} cannot be decrypted here: {first_line(lacking)}.") from lacking
        except (TypeError, ValueError) as wrong:
            raise BuildError(f"The passphrase of {path} is not right; give it again.") from wrong
    if not isinstance(key, Ed25519PrivateKey):
        raise BuildError(f"{path} has a key of another kind than Ed25519; make one with ssh-keygen -t ed25519.")
    return SigningKey(key)


def _require_cryptography(kind: type[Exception], what: str) -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise kind(f"{what} needs the Python package cryptography: pip install 'cryptography>=3.4.8'.") from None
