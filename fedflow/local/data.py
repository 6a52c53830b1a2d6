"""A data loader as a stream that can be resumed: a round goes on where this site stopped reading."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from fedflow.errors import TrainingInvalid, field_error
from fedflow.local.generators import generators, set_generators

__all__ = ["DataView", "GeneratedStream", "Stream"]

log = logging.getLogger(__name__)


class Stream(ABC):
    """Batches, epoch after epoch, over any number of rounds. Iterating again goes on where it stopped.

    place:    where to go on, as `place()` gave it; None = at the beginning
    epochs:   epochs in one iteration; None = it goes on until `ended`
    ended:    whether the training has taken its steps: then there is no further batch
    on_begin, on_end: called before the first batch is read, and when there is no further one
    """

    def __init__(
        self,
        *,
        place: Mapping[str, Any] | None = None,
        epochs: int | None = 1,
        ended: Callable[[], bool] = lambda: False,
        on_begin: Callable[[], None] = lambda: None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._epochs, self._ended, self._on_begin, self._on_end = epochs, ended, on_begin, on_end
        self._at: dict[str, Any] = {"epoch": 0, "batch": 0, "length": None, "start": None, **(place or {})}
        self._committed = dict(self._at)
        self._began = False

    @abstractmethod
    def _batches(self) -> Iterable[Any]:
        """The rest of the epoch in which the stream stands."""

    def place(self) -> dict[str, Any]:
        """Where the last completed step stopped reading: epoch, batch within it, generators at its beginning."""
        return dict(self._committed)

    def commit(self) -> None:
        """A step is complete: the batches so far belong to it."""
        self._committed = dict(self._at)

    def __iter__(self) -> Iterator[Any]:
        if not self._began:
            self._began = True
            self._on_begin()
        left, empty = self._epochs, 0
        while left != 0 and empty < 2 and not self._ended():
            empty += 1
            for batch in self._batches():
                empty = 0
                self._at = {**self._at, "batch": self._at["batch"] + 1}
                yield batch
                if self._ended():
                    break
            else:
                self._at = {"epoch": self._at["epoch"] + 1, "batch": 0, "length": None, "start": None}
                left = left if left is None or empty else left - 1
        self._on_end()


class GeneratedStream(Stream):
    """Epochs that `make()` shuffles with `generator` and with nothing else."""

    def __init__(self, make: Callable[[], Iterable[Any]], generator: torch.Generator, **options: Any) -> None:
        super().__init__(**options)
        self._make, self._generator = make, generator

    def _batches(self) -> Iterable[Any]:
        if self._at["start"] is None:
            self._at["start"] = self._generator.get_state()
        else:
            self._generator.set_state(self._at["start"])
        return islice(self._make(), self._at["batch"], None)


class DataView(Stream):
    """`loader` read as its training loop would read it.

    The batches and every random draw are those of the plain loader: what is kept between rounds is the state of the
    generators at the beginning of the epoch, and how many of its batches belong to completed steps. What the loader's worker
    processes draw is the plain loader's until a round goes on within an epoch, or persistent workers begin their second one.
    Everything else (`len`, `dataset`, `batch_size`, ...) is the loader's.

    strict: a loader whose order cannot be known beforehand is an error; else it is read from its beginning, with a warning
    """

    def __init__(
        self, loader: Any, *, place: Mapping[str, Any] | None = None, strict: bool = False, **options: Any
    ) -> None:
        self._loader = loader
        self._resumable = self._check(strict)
        self._seeds = torch.Generator()  # of the loader's workers
        super().__init__(place=place if self._resumable else None, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_loader"], name)

    def __len__(self) -> int:
        return len(self._loader)

    def _batches(self) -> Iterable[Any]:
        if not self._resumable:
            whole: Iterable[Any] = self._loader
            return whole
        order: list[Any] = self._order()
        if self._at["length"] not in (None, len(order)):
            log.warning(
                "data: found %d batches an epoch, expected the %d that were there before; reading from the beginning",
                len(order),
                self._at["length"],
            )
            self._at |= {"batch": 0}
        self._at |= {"length": len(order)}
        rest = order[self._at["batch"] :]
        if not rest:
            return ()
        if isinstance(self._loader, Sequence):
            return (self._loader[i] for i in rest)
        torch.empty(self._at["batch"], dtype=torch.int64).random_(generator=self._seeds)  # others, further on
        return _like(self._loader, rest, self._seeds)

    def _order(self) -> list[Any]:
        """Indices of the epoch's batches, from the draws that the plain loader makes when an epoch begins."""
        if isinstance(self._loader, Sequence):
            return list(range(len(self._loader)))
        own = _own_generators(self._loader)
        if self._at["start"] is None:
            self._at["start"] = {**generators(), "own": [g.get_state() for g in own]}
            return self._draw()
        with _replayed(self._at["start"], own):
            return self._draw()

    def _draw(self) -> list[Any]:
        loader, epoch = self._loader, self._at["epoch"]
        sampler = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
        parts: tuple[Any, ...] = (sampler, getattr(sampler, "sampler", None))
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        self._seeds.set_state((loader.generator or torch.default_generator).get_state())
        indices = iter(sampler)
        if not (loader.persistent_workers and epoch):
            torch.empty((), dtype=torch.int64).random_(generator=loader.generator)  # the workers' seed
        return list(indices)

    def _check(self, strict: bool) -> bool:
        """Whether the order of the batches can be known before they are read."""
        unknown = _without_order(self._loader)
        if unknown is None:
            return True
        text = field_error(
            "data",
            type(unknown).__name__,
            "a DataLoader over a dataset with indices and a sampler with a length, or a list of batches",
            "without it a round reads from the beginning",
        )
        if strict:
            raise TrainingInvalid(text)
        log.warning("%s", text)
        return False


def _without_order(loader: Any) -> Any:
    """What keeps the order of the batches from being known before they are read; None where nothing does."""
    if isinstance(loader, Sequence) and not isinstance(loader, (str, bytes)):
        return None
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        return loader  # a loader's own __iter__ may do anything to its batches
    if isinstance(loader.dataset, IterableDataset):
        return loader.dataset
    try:
        len(loader)
    except (TypeError, NotImplementedError):
        sampler = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
        return getattr(sampler, "sampler", sampler)
    return None


def _own_generators(loader: Any) -> list[torch.Generator]:
    """Generators that the loader and its samplers were given."""
    sampler = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
    parts = (loader, sampler, getattr(sampler, "sampler", None))
    found = [g for part in parts if isinstance(g := getattr(part, "generator", None), torch.Generator)]
    return list({id(g): g for g in found}.values())


@contextmanager
def _replayed(start: Mapping[str, Any], own: list[torch.Generator]) -> Iterator[None]:
    """The process's generators as they were at `start`, put back afterwards; the loader's own stay where they then are."""
    now = generators()
    set_generators(start)
    for generator, state in zip(own, start["own"], strict=False):
        generator.set_state(state)
    try:
        yield
    finally:
        set_generators(now)


def _like(loader: Any, order: list[Any], seeds: torch.Generator) -> DataLoader[Any]:
    """`loader` with its batches in this order; of generators in this process it draws from `seeds` only."""
    chosen: dict[str, Any] = {"batch_sampler": order} if loader.batch_sampler is not None else {"sampler": order}
    if loader.batch_sampler is None:
        chosen["batch_size"] = None
    if loader.num_workers:
        chosen |= {"prefetch_factor": loader.prefetch_factor}
    return DataLoader(
        loader.dataset,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=seeds,
        **chosen,
    )
