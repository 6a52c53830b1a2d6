"""Private set intersection: what two or three sites have in common, and nothing else of what each has (DH-PSI: Meadows, "A more efficient
cryptographic matchmaking protocol", IEEE S&P 1986; Huberman, Franklin and Hogg, EC 1999, doi:10.1145/336992.337012).

    blind:   site i: Lᵢ ← [kᵢ·H(x) for its items x], in the order of these bytes, whose place tells nothing of x
    second:  site i: kᵢ·L of the site before it; of three sites, sealed for the one after it
    third:   site i, of three: kᵢ·(that)
    reveal:  the server, which now has every list under all the keys, tells each site which places of its list are in all of them
H goes to Curve25519, in whose group kᵢ(kⱼ·P) = kⱼ(kᵢ·P), and kᵢ·P tells nothing of P without kᵢ (decisional Diffie–Hellman). kᵢ is drawn at the
site and never leaves it. Of three sites the lists under two keys are sealed: who could read them could compare two sites' items.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Annotated, Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fedflow.algorithm import Algorithm, Own
from fedflow.errors import ResolveError, TrainingInvalid, UpdateInvalid, field_error
from fedflow.types import (
    Aggregate,
    Groups,
    Result,
    RoundContext,
    SiteId,
    Spec,
    Tensors,
    TensorSpec,
    Update,
    canonical_json,
)

__all__ = ["PSI", "Item", "OwnItems", "PSIState", "SiteSecrets", "texts"]

POINT = 32
"""Bytes of a point of the curve, and of a key."""
SEAL = 48
"""Bytes that sealing adds."""
DOMAIN = b"fedflow psi"

Item = Callable[[Any], str | None]
"""A value -> the item that it is; None where it is missing. Raises ValueError where it can be none."""


class OwnItems(Own, Protocol):
    """What a site gives to private set intersection."""

    def items(self, column: str | None, item: Item) -> Iterable[Any]:
        """The site's values: those of a column where it has a table, else its own. Raises ResolveError where it has none."""
        ...

    def matched(self, items: Sequence[str], item: Item) -> None:
        """Let the data know which of its items are everybody's, if it wants to."""
        ...


@dataclass(frozen=True)
class PSIState:
    """lists: site -> its list as far as it has come; keys: site -> what others seal for it with; places: site -> of its list, in all lists;
    sizes: canonical JSON, site -> items"""

    lists: Tensors = field(default_factory=dict)
    keys: Tensors = field(default_factory=dict)
    places: Tensors = field(default_factory=dict)
    sizes: str = "{}"


@dataclass(frozen=True)
class SiteSecrets:
    """What a site remembers; it never leaves the site. secrets: until the end, the scalar k, and the key to what is sealed for it;
    items: JSON, its items in the order of its list; in the end, those that all sites have, sorted"""

    secrets: Tensors = field(default_factory=dict)
    items: Tensors = field(default_factory=dict)

    @property
    def texts(self) -> list[str]:
        found: list[str] = json.loads(bytes(self.items["items"].numpy()))
        return found


class PSI(Algorithm):
    """The items that all sites have, of two or three sites. The recipe's workload is the items, or a table of which `column` has them."""

    kind: Literal["psi"] = "psi"
    trains: ClassVar[bool] = False
    work: ClassVar[str] = "fedflow.local.matching:ItemData"
    partitionable: ClassVar[bool] = False
    needs_all: ClassVar[bool] = True
    coordinator_only: ClassVar[bool] = True  # who reads all lists under all keys can tell what two of three sites share
    phases: ClassVar[tuple[str, ...]] = ("blind", "second", "third", "reveal")
    State: ClassVar[type[Any]] = PSIState
    SiteState: ClassVar[type[Any]] = SiteSecrets

    column: Annotated[str, Field(min_length=1)] | None = None
    """The column with the items, where the workload is a table. Default: the workload is the items: texts and whole numbers."""
    unicode: Literal["NFC", "NFKC"] = "NFC"
    """Texts are equal if they are in this normal form: NFC tells apart what looks different, NFKC takes "ﬁ" for "fi". Ours."""
    ignore_case: bool = False
    """Whether "Ada" is "ADA", by Unicode's case folding."""
    false_positive_rate: Annotated[float, Field(gt=0, le=1e-3, allow_inf_nan=False)] = 1e-12
    """The most that the probability of any wrong item may be: of the last lists, only the bytes that this takes are compared. Ours."""
    max_items: Annotated[int, Field(ge=1, le=100_000_000, strict=True)] = 2_000_000
    """The most that a site may have. Ours."""

    def item(self, value: Any) -> str | None:
        """`value` as an item: texts in this normal form and case, whole numbers as decimal digits; None where it is missing.

        Raises ValueError where it is neither a text nor a whole number.
        """
        if isinstance(value, str):
            text = unicodedata.normalize(self.unicode, _folded(value, self.unicode) if self.ignore_case else value)
            if not text.isascii():
                text.encode()  # a lone surrogate raises UnicodeEncodeError, which is a ValueError
            return text or None
        if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
            return str(int(value))
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return None
        found = type(value).__name__  # not the value: the message leaves the site
        raise ValueError(field_error("items", found, "texts and whole numbers", "convert them at the site"))

    @property
    def least_updates(self) -> int:
        return 2

    @property
    def most_updates(self) -> int:
        return 3

    @property
    def gathers(self) -> bool:
        return True

    # -- server
    def init(self, model: Groups) -> PSIState:
        return PSIState()

    def model(self, state: PSIState) -> Groups:
        return {"params": {}, "frozen": {}, "buffers": {}}

    def result(self, state: PSIState) -> Result:
        """The sizes only: the server knows no item."""
        common = next((len(places) for places in state.places.values()), None)
        return Result({"sites": json.loads(state.sizes), "intersection": common})

    def page(self, result: Result, sites: Sequence[SiteId], excluded: Mapping[SiteId, str]) -> str:
        rows = [*result.values["sites"].items(), ("**in all**", result.values["intersection"])]
        return "\n".join(["| site | items |", "|---|---|", *(f"| {site} | {count} |" for site, count in rows)])

    def broadcast(self, state: PSIState, phase: str) -> Groups:
        """The lists under all keys stay at the server."""
        lists = state.lists if phase in ("second", "third") else {}
        return {"lists": lists, "keys": state.keys, "places": state.places if phase == "reveal" else {}}

    def expects(self, state: PSIState, phase: str) -> Spec:
        if phase == "reveal":
            return {}
        points = TensorSpec((POINT * self.max_items + SEAL,), torch.uint8, up_to=True)
        key = {"key": TensorSpec((POINT,), torch.uint8)} if phase == "blind" else {}
        return {"sent": {"list": points, **key}}

    def weight(self, update: Update) -> float:
        return 1.0

    def decode(self, update: Update, state: PSIState, phase: str) -> Update:
        if phase == "reveal":
            return update
        found = len(update.tensors["sent"]["list"])
        if phase == "blind" and found % POINT:
            raise UpdateInvalid(f"list: found {found} bytes, expected {POINT} an item", site=update.site)
        if phase != "blind" and found != (expected := self._length(update.site, state, phase)):
            raise UpdateInvalid(f"list: found {found} bytes, expected {expected}", site=update.site)
        return update

    def _length(self, site: SiteId, state: PSIState, phase: str) -> int:
        """Bytes that `site` sends in a phase after the first one."""
        sizes: dict[SiteId, int] = json.loads(state.sizes)
        if (owner := _owner(site, sorted(sizes), phase)) is None:
            return 0
        last = _is_last(len(sizes), phase)
        return sizes[owner] * self._width(sizes.values()) if last else sizes[owner] * POINT + SEAL

    def _width(self, sizes: Iterable[int]) -> int:
        """Bytes of a point that are compared: of n·m pairs, one is equal by chance with n·m / 256^bytes."""
        pairs = sum(n * m for n, m in itertools.combinations(sizes, 2))
        return min(POINT, math.ceil(math.log2(max(pairs, 1) / self.false_positive_rate) / 8))

    def aggregate(self, updates: Iterable[Update], ctx: RoundContext) -> Aggregate:
        """What every site sent, by site."""
        sent = {update.site: update.tensors.get("sent", {}) for update in updates}
        return Aggregate(sent, float(len(sent)), len(sent), {site: {} for site in sent})

    def server_update(self, state: PSIState, aggregate: Aggregate, ctx: RoundContext) -> PSIState:
        if ctx.phase == "reveal":
            return replace(state, keys={})
        sent = {site: part["list"] for site, part in aggregate.tensors.items()}
        if ctx.phase == "blind":
            keys = {site: part["key"] for site, part in aggregate.tensors.items()}
            sizes = {site: len(points) // POINT for site, points in sent.items()}
            return PSIState(sent, keys, {}, canonical_json(sizes).decode())
        sites = sorted(sent)
        owners = {owner: site for site in sites if (owner := _owner(site, sites, ctx.phase)) is not None}
        lists = {owner: sent[site] for owner, site in owners.items()}
        if not lists:  # of two sites, the third phase
            return state
        if not _is_last(len(sites), ctx.phase):
            return replace(state, lists=lists)
        return replace(state, lists={}, places=_places(lists, self._width(json.loads(state.sizes).values())))

    # -- site
    def site_update(
        self, broadcast: Groups, site_state: SiteSecrets, work: OwnItems, ctx: RoundContext
    ) -> tuple[Update, SiteSecrets]:
        assert ctx.site is not None
        sent: dict[str, Tensor] = {}
        metrics: dict[str, float] = {}
        if ctx.phase == "blind":
            sent, site_state = self._blinded(work, ctx)
        elif ctx.phase == "reveal":
            items = site_state.texts
            common = sorted(items[place] for place in broadcast["places"][ctx.site].tolist())
            work.matched(common, self.item)
            site_state = SiteSecrets({}, {"items": _json(common)})
            metrics = {"items": float(len(items)), "intersection": float(len(common))}
        else:
            sent = {"list": self._passed_on(broadcast, site_state, work, ctx)}
        groups = {} if ctx.phase == "reveal" else {"sent": sent}
        return Update(ctx.site, ctx.round, 1, 1, 0.0, groups, metrics=metrics, numerics=work.recorded()), site_state

    def _blinded(self, work: OwnItems, ctx: RoundContext) -> tuple[dict[str, Tensor], SiteSecrets]:
        """A list under a new key. From the system's random numbers: whoever knew them could try items out."""
        try:
            items = texts(work.items(self.column, self.item), self.item)
        except ValueError as error:
            raise TrainingInvalid(f"psi: {error}", **ctx.place) from error
        if len(items) > self.max_items:
            told = field_error("psi: items", len(items), f"at most {self.max_items}", "raise algorithm.max_items")
            raise TrainingInvalid(told, **ctx.place)
        scalar, key = os.urandom(POINT), _sealing()[0].generate()
        points = _split(_raised(scalar, b"".join(_hashed(items)), _threads(work)))
        order = sorted(range(len(items)), key=points.__getitem__)
        sent = {"list": _bytes(b"".join(points[i] for i in order)), "key": _bytes(bytes(key.public_key))}
        secrets = {"scalar": _bytes(scalar), "key": _bytes(bytes(key))}
        return sent, SiteSecrets(secrets, {"items": _json([items[i] for i in order])})

    def _passed_on(self, broadcast: Groups, secrets: SiteSecrets, work: Own, ctx: RoundContext) -> Tensor:
        """Another site's list under this one's key too."""
        assert ctx.site is not None
        sites, lists = sorted(broadcast["keys"]), {s: bytes(t.numpy()) for s, t in broadcast["lists"].items()}
        if (owner := _owner(ctx.site, sites, ctx.phase)) is None:
            return _bytes(b"")
        private, public, box, refused = _sealing()
        known = {name: bytes(tensor.numpy()) for name, tensor in secrets.secrets.items()}
        sealed = ctx.phase == "third"
        try:
            points = box(private(known["key"])).decrypt(lists[owner]) if sealed else lists[owner]
            raised = _raised(known["scalar"], points, _threads(work))
        except refused as error:
            told = f"found what is none ({error}), expected points of the curve{', sealed for this site' if sealed else ''}"
            raise TrainingInvalid(f"psi: the list of {owner}: {told}; start the run anew", **ctx.place) from error
        if _is_last(len(sites), ctx.phase):
            width = self._width((len(found) - SEAL * sealed) // POINT for found in lists.values())
            return _bytes(b"".join(point[:width] for point in _split(raised)))
        after = sites[(sites.index(ctx.site) + 1) % len(sites)]
        return _bytes(box(public(bytes(broadcast["keys"][after].numpy()))).encrypt(raised))


def _owner(site: SiteId, sites: Sequence[SiteId], phase: str) -> SiteId | None:
    """Whose list `site` has in `phase`: that of the site before it, then of the one before that; None: of two sites, in the third."""
    back = {"second": 1, "third": 2}[phase]
    return sites[sites.index(site) - back] if back < len(sites) else None


def _is_last(sites: int, phase: str) -> bool:
    """Whether the lists are then under all the keys."""
    return phase == ("second" if sites == 2 else "third")


def _places(lists: Tensors, width: int) -> dict[str, Tensor]:
    """Of every list, the places of those points that are in all of them."""
    rows = {s: np.frombuffer(bytes(t.numpy()), dtype=np.dtype((np.void, width))) for s, t in lists.items()}
    common = reduce(np.intersect1d, rows.values())
    return {site: torch.from_numpy(np.flatnonzero(np.isin(found, common))) for site, found in rows.items()}


# -- items -------------------------------------------------------------------------------------------------------------
def texts(values: Iterable[Any], item: Item) -> list[str]:
    """The items among `values`, sorted and each once. Raises ValueError as `item` does."""
    return sorted({text for value in values if (text := item(value)) is not None})


def _folded(text: str, form: Literal["NFC", "NFKC"]) -> str:
    """`text` without case, as the Unicode Standard has it (D145, D146): decomposed before, and where compatible letters are one
    ("ℌ" and "H"), once more behind that."""
    folded = unicodedata.normalize("NFD", text).casefold()
    return unicodedata.normalize(form, folded).casefold() if form == "NFKC" else folded


# -- the group ---------------------------------------------------------------------------------------------------------
_PRIME = 2**255 - 19


def _hashed(items: Sequence[str]) -> list[bytes]:
    """H: items -> the subgroup of prime order, by Elligator 2 (RFC 9380); as x25519 has points: u = (1 + y) / (1 − y)."""
    bindings = _bindings()
    ys = []
    for item in items:
        digest = hashlib.blake2b(item.encode(), digest_size=32, person=DOMAIN).digest()
        point = bindings.crypto_core_ed25519_from_uniform(digest)
        ys.append(int.from_bytes(point, "little") & (2**255 - 1))
    inverses = _inverses([(1 - y) % _PRIME for y in ys])
    return [((1 + y) * inverse % _PRIME).to_bytes(POINT, "little") for y, inverse in zip(ys, inverses, strict=True)]


def _inverses(values: Sequence[int]) -> list[int]:
    """Of all at once, modulo the prime, with one exponentiation (Montgomery's trick)."""
    products = list(itertools.accumulate(values, lambda a, b: a * b % _PRIME, initial=1))
    inverse, found = pow(products[-1], -1, _PRIME), [0] * len(values)
    for i in range(len(values) - 1, -1, -1):
        found[i], inverse = inverse * products[i] % _PRIME, inverse * values[i] % _PRIME
    return found


def _raised(scalar: bytes, points: bytes, threads: int) -> bytes:
    """k·P of every point, in their order. Raises CryptoError of one of small order, which no item is hashed to."""
    multiply = _bindings().crypto_scalarmult

    def part(chunk: Sequence[bytes]) -> bytes:
        return b"".join(multiply(scalar, point) for point in chunk)

    with ThreadPoolExecutor(threads) as pool:
        return b"".join(pool.map(part, _chunks(_split(points))))


def _split(points: bytes) -> list[bytes]:
    return [points[i : i + POINT] for i in range(0, len(points), POINT)]


def _chunks(points: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    return (points[i : i + 4096] for i in range(0, len(points), 4096))


def _threads(work: Own) -> int:
    return int(work.recorded()["threads"])


def _bindings() -> Any:
    """libsodium's. Raises ResolveError where it is not installed."""
    try:
        import nacl.bindings
    except ImportError as error:
        raise ResolveError("psi: found no PyNaCl, expected it; pip install 'fedflow[psi]'") from error
    return nacl.bindings


def _sealing() -> tuple[Any, Any, Any, Any]:
    """Its private and public keys, boxes that only the key's owner opens, and what is raised where that, or a point, is not to be had."""
    _bindings()
    from nacl.exceptions import CryptoError
    from nacl.public import PrivateKey, PublicKey, SealedBox

    return PrivateKey, PublicKey, SealedBox, CryptoError


def _bytes(data: bytes) -> Tensor:
    found: NDArray[np.uint8] = np.frombuffer(data, dtype=np.uint8).copy()
    return torch.from_numpy(found)


def _json(items: Sequence[str]) -> Tensor:
    return _bytes(json.dumps(items, ensure_ascii=False).encode())
