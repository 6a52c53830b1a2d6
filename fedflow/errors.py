"""The tree of errors.

    FedflowError
    ├── UserError                  the user can put it right: exit code 2 and one line, never a traceback
    │   ├── RecipeError            a field of the recipe or of the federation file
    │   ├── ResolveError           a name that leads to no algorithm, workload or model
    │   ├── CheckpointError        an initial checkpoint that does not fit the model
    │   ├── RunExists, RunMissing  a run id that is taken by another recipe, or that nobody knows
    │   └── UnreachableError       a server, a pool, a worker that is not there
    ├── RoundError                 a round that cannot be committed now; what is committed stays, the run can be resumed
    │   ├── QuorumLost             fewer valid updates than the quorum at the deadline
    │   └── RoundAborted           a person stopped it
    ├── SiteError                  something at one site; the round decides what it means
    │   ├── UpdateInvalid          an update that does not count, with the reason
    │   ├── RecipeRefused          a recipe that the site's owner has not approved, or that takes more than the site's limits
    │   ├── TrainingInvalid        training code that cannot take part as it is; a retry would not help
    │   ├── SiteStateLost          the state that the plan names is not at the site
    │   └── OpeningClosed          the round went on without this site
    └── StoreError                 the object store
        ├── ObjectExists           a create-only write met an object
        ├── ObjectMissing, ObjectCorrupt
        ├── SignatureInvalid       a record that its writer did not sign
        ├── StoreUnavailable       transient: may heal, worth a retry
        ├── StoreUnwritable        read-only, out of space, no permission
        └── KeyEscapesRoot         a key that leads out of its root

Every error's text says what was found, what was expected and what to do next.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

__all__ = [
    "CheckpointError",
    "FedflowError",
    "KeyEscapesRoot",
    "ObjectCorrupt",
    "ObjectExists",
    "ObjectMissing",
    "OpeningClosed",
    "QuorumLost",
    "RecipeError",
    "RecipeRefused",
    "ResolveError",
    "RoundAborted",
    "RoundError",
    "RunExists",
    "RunMissing",
    "SignatureInvalid",
    "SiteError",
    "SiteStateLost",
    "StoreError",
    "StoreUnavailable",
    "StoreUnwritable",
    "TrainingInvalid",
    "UnreachableError",
    "UpdateInvalid",
    "UserError",
    "field_error",
    "one_line",
]


class FedflowError(Exception):
    """Base of every error that fedflow raises on purpose."""

    def __init__(
        self, message: str, *, run: str | None = None, round: int | None = None, site: str | None = None
    ) -> None:
        super().__init__(message)
        self.reason = message
        self.run, self.round, self.site = run, round, site

    def __str__(self) -> str:
        place = ", ".join(
            f"{name} {value}"
            for name, value in (("run", self.run), ("round", self.round), ("site", self.site))
            if value is not None
        )
        text = super().__str__()
        return f"{place}: {text}" if place else text


class UserError(FedflowError):
    """Something that the user can put right: shown as one line, exit code 2."""


class RecipeError(UserError):
    """A field of the recipe, of the federation file or of a site's configuration."""


class ResolveError(UserError):
    """A name in the recipe that leads to nothing here."""


class CheckpointError(UserError):
    """An initial checkpoint that cannot be read or does not fit the model."""


class RunExists(UserError):
    """The run id is taken by a run with another recipe."""


class RunMissing(UserError):
    """No run of that id in this store."""


class UnreachableError(UserError):
    """A server, work pool, worker or store that does not answer."""


class RoundError(FedflowError):
    """The round cannot be committed now. What is committed stays; the run can be resumed."""


class QuorumLost(RoundError):
    """Fewer valid updates than the quorum when the round closed."""


class RoundAborted(RoundError):
    """A person stopped the run."""


class SiteError(FedflowError):
    """Something at one site; the round's rules (retry, exclude, quorum) decide what it means."""


class UpdateInvalid(SiteError):
    """An update that does not count; the text is the reason that manifest and UI show."""


class RecipeRefused(SiteError):
    """The site's owner has not approved the recipe, or it takes more than the site's limits allow; a retry would not help."""


class TrainingInvalid(SiteError):
    """The site's training code cannot take part as it is; a retry would not help."""


class SiteStateLost(SiteError):
    """The site does not have the state that the plan names."""


class OpeningClosed(SiteError):
    """The round closed, or its deadline passed, while this site was still training."""


class StoreError(FedflowError):
    """The object store."""


class ObjectExists(StoreError):
    """A create-only write met an object that is there already; that object is unchanged."""


class ObjectMissing(StoreError):
    """No object under that key."""


class ObjectCorrupt(StoreError):
    """An object whose size or digest differs from what its reference says."""


class SignatureInvalid(StoreError):
    """A record without the signature of the one who is to have written it."""


class StoreUnavailable(StoreError):
    """The store does not answer just now; a retry may help."""


class StoreUnwritable(StoreError):
    """The store refuses the write: read-only, out of space, no permission."""


class KeyEscapesRoot(StoreError):
    """A key that is absolute, has a scheme, or leads out of its root."""


def check_suffix(field: str, out: Path, suffixes: Iterable[str]) -> None:
    """Raises UserError where the name of a file to write ends in none of them."""
    if out.suffix not in suffixes:
        raise UserError(field_error(field, str(out), f"a name that ends in one of {', '.join(suffixes)}", "rename it"))


def field_error(field: str, found: object, expected: str, fix: str) -> str:
    """The one form of a user's mistake: which field, what was found, what was expected, what to do."""
    return f"{field}: found {found!r}, expected {expected}; {fix}"


def one_line(text: str) -> str:
    """`text` in one line; of a traceback only its exception is kept."""
    kept, inside = [], False
    for line in text.splitlines():
        if line.startswith("Traceback (most recent call last)"):
            inside = True
        elif not inside or (line.strip() and not line.startswith(" ")):
            kept.append(line.strip())
            inside = False
    return " ".join(part for part in kept if part)
