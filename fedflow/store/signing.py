"""Ed25519 keys and signatures: who wrote a record, and for which place in which run.

A record's signature stands beside its digest in the stored bytes and is part of no digest: what is signed has the bits of
what is not. Ed25519 gives the same signature each time, so a record that is written again is the same bytes again.
"""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Self

from fedflow.errors import UserError, field_error
from fedflow.recipe import SiteConfig
from fedflow.types import SiteId, canonical_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

__all__ = ["COORDINATOR_KEY", "Keys", "PrivateKey", "is_signed_by", "message"]

COORDINATOR_KEY = "FEDFLOW_COORDINATOR_KEY"
"""Variable of the coordinator's environment: the path of its private key."""

_PREFIX = "ed25519:"


class PrivateKey:
    """One half of a key pair, read from its file. public: the other half, "ed25519:<base64>"."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = _PREFIX + base64.b64encode(key.public_key().public_bytes_raw()).decode()

    @classmethod
    def create(cls, path: Path) -> Self:
        """A new key in a new file that only its owner may read. Raises UserError where there is a file, which stays."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

        key = Ed25519PrivateKey.generate()
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        except FileExistsError as error:
            fix = "move it away if it is not used any more"
            raise UserError(field_error("key", str(path), "a path where there is nothing", fix)) from error
        except OSError as error:
            fix = f"make the folder, or choose another path: {error.strerror}"
            raise UserError(field_error("key", str(path), "a path that can be written", fix)) from error
        with os.fdopen(handle, "wb") as file:
            file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
            file.flush()
            os.fsync(file.fileno())
        return cls(key)

    @classmethod
    def load(cls, path: Path, field: str = "key") -> Self:
        """The key in that file. Raises UserError naming `field` where there is none, or others may read it."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        expected = "a file with an Ed25519 private key"
        try:
            if path.stat().st_mode & 0o077:
                wanted = "a file that only its owner may read"
                raise UserError(field_error(field, str(path), wanted, f"chmod 600 {path}"))
            found = load_pem_private_key(path.read_bytes(), password=None)
        except OSError as error:
            fix = f"make it with `fedflow site enroll`, or correct the path: {error.strerror}"
            raise UserError(field_error(field, str(path), expected, fix)) from error
        except (ValueError, TypeError) as error:
            raise UserError(field_error(field, str(path), expected, "restore it, or enroll anew")) from error
        if not isinstance(found, Ed25519PrivateKey):
            raise UserError(field_error(field, str(path), expected, "make one with `fedflow site enroll`"))
        return cls(found)

    def sign(self, signed: bytes) -> str:
        """The signature, base64."""
        return base64.b64encode(self._key.sign(signed)).decode()


def message(kind: str, nonce: str, key: str, digest: str) -> bytes:
    """What is signed of a record. kind: its class; nonce: of its run; key: its place in the store"""
    return canonical_json(["fedflow record 1", kind, nonce, key, digest])


def is_signed_by(public: str, signed: bytes, signature: str) -> bool:
    """Whether `signature` is that of the holder of `public`'s other half."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = Ed25519PublicKey.from_public_bytes(base64.b64decode(public.removeprefix(_PREFIX), validate=True))
        key.verify(base64.b64decode(signature, validate=True), signed)
    except (InvalidSignature, ValueError):
        return False
    return True


@dataclass(frozen=True)
class Keys:
    """What a process signs records with, and whose signature it asks for.

    own:         signs what this process writes; None: nothing is signed
    coordinator: who must have signed the coordinator's records; None: nobody looks
    site:        where this is a site: whose records `own` must have signed. Others' must have the signatures that the run's
                 record pins, as all sites' must for the coordinator
    """

    own: PrivateKey | None = None
    coordinator: str | None = None
    site: SiteId | None = None

    @property
    def public(self) -> str | None:
        """Of `own`."""
        return self.own.public if self.own else None

    @classmethod
    def here(cls, expected: str | None = None) -> Keys:
        """The coordinator's, of the file that this process's environment names; none where it names none.

        expected: the federation's `coordinator_key`. Raises UserError where that is another.
        """
        path = os.environ.get(COORDINATOR_KEY)
        own = _loaded(Path(path)) if path else None
        found = own.public if own else None
        if expected is not None and found != expected:
            raise UserError(
                field_error(
                    COORDINATOR_KEY,
                    found,
                    f"the path of the private key of {expected}, the federation's coordinator_key",
                    "set it where runs are started and where the coordinator's worker runs, or start the run in the UI",
                )
            )
        return cls(own, found)

    @classmethod
    def at(cls, config: SiteConfig) -> Keys:
        """A site's. Raises UserError where its key cannot be read."""
        own = PrivateKey.load(Path(config.key)) if config.key else None
        return cls(own, config.coordinator_key, config.name)


@lru_cache(maxsize=4)
def _loaded(path: Path) -> PrivateKey:
    return PrivateKey.load(path, COORDINATOR_KEY)
