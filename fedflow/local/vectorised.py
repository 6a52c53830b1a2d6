"""Sites of one machine trained together: one call of the model for all of them, by `torch.func.vmap` over their parameters.

    together = Together()
    found = together.run([Part(training, lambda work: algorithm.site_update(broadcast, state, work, ctx)), ...])

An algorithm's part at a site stays as it is: it is pure, and so it is run until it asks for a training, and, once the
trainings that all sites of the block have asked for are done, run again with what its own came to.

What comes out is what the loop gives, within rounding (`numerics.deterministic: fast`). Trained together are sites with the
built-in loop, one model and one kind of optimizer and correction; steps on batches of equal shape are taken together, others in
groups. Whatever cannot be (random draws in the model or the loss, BatchNorm's statistics, losses that depend on the site's
workload, control flow that depends on values) is noticed, undone and done by the loop, with one line in the log; from then on all is. Where
code of one site fails, those that are trained with it are done by the loop this once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedflow.algorithm import NO_CORRECTION, NO_MERGE, Correction, Evaluated, LocalResult, Merge, Training
from fedflow.local import numerics
from fedflow.local.data import GeneratedStream
from fedflow.local.generators import generators, seed_all
from fedflow.local.model import load_groups
from fedflow.local.optimizers import Plain, make_optimizer
from fedflow.local.session import warn_of_momentum
from fedflow.local.trainer import mapped
from fedflow.local.training import LocalTrainer, batches_of
from fedflow.local.workload import evaluates
from fedflow.types import MODEL_GROUPS, Groups, RoundContext, Tensors

__all__ = ["FAILURES", "Part", "Together", "train_together"]

log = logging.getLogger(__name__)

T = TypeVar("T")

FAILURES = (Exception, SystemExit)
"""What code of a site fails by: who calls sys.exit() there does not end a process that works for other sites, too."""

_LARGEST = 16 << 20  # bytes of a model: in larger ones, a site's own step keeps a processor busy
_KEPT = 8  # times the size of a model that is kept for a site, at most
_FEWEST = 4  # sites that are worth it: a step has a cost whatever their number
_TRIED = 3  # steps of a trial
_CLOSE = 1e-3  # of what they moved, that parameters may differ by after a trial


class CannotTogether(Exception):
    """Why sites cannot be trained together."""


# -- whoever asks ------------------------------------------------------------------------------------------------------
@dataclass
class Part(Generic[T]):
    """What is done for one site. run: pure in its argument, the training; it may be called several times."""

    training: Training
    run: Callable[[Training], T]


@dataclass(frozen=True)
class Wish:
    """One call of a site's training."""

    method: str
    broadcast: Groups
    ctx: RoundContext
    correction: Correction = NO_CORRECTION
    steps: int | None = None
    preserve: bool = False
    merge: Merge = NO_MERGE

    def done(self, training: Training) -> Any:
        """By the loop."""
        if self.method != "train":
            return getattr(training, self.method)(self.broadcast, self.ctx)
        options = {"correction": self.correction, "steps": self.steps, "preserve": self.preserve, "merge": self.merge}
        return training.train(self.broadcast, self.ctx, **options)  # type: ignore[arg-type]


class _Waits(BaseException):
    """A part has asked for something that is not done yet."""


@dataclass
class _Replay:
    """The training that a part is given: it has done what was asked for before, in the same order."""

    part: Part[Any]
    answers: list[Any] = field(default_factory=list)
    wish: Wish | None = None
    found: Any = None
    at: int = 0

    def advance(self) -> None:
        """Run the part from its beginning to its next wish, or its end."""
        self.at, self.wish = 0, None
        try:
            self.found = self.part.run(self)
        except _Waits:
            pass
        except FAILURES as error:
            self.found = error

    def _asked(self, wish: Wish) -> Any:
        if self.at == len(self.answers):
            self.wish = wish
            raise _Waits
        answer = self.answers[self.at]
        self.at += 1
        if isinstance(answer, FAILURES):
            raise answer
        return answer

    def train(self, broadcast: Groups, ctx: RoundContext, **options: Any) -> LocalResult:
        found: LocalResult = self._asked(Wish("train", broadcast, ctx, **options))
        return found

    def gradient(self, broadcast: Groups, ctx: RoundContext) -> Tensors:
        found: Tensors = self._asked(Wish("gradient", broadcast, ctx))
        return found

    def loss(self, broadcast: Groups, ctx: RoundContext) -> float:
        found: float = self._asked(Wish("loss", broadcast, ctx))
        return found

    def evaluate(self, broadcast: Groups, ctx: RoundContext) -> Evaluated:
        found: Evaluated = self._asked(Wish("evaluate", broadcast, ctx))
        return found


class Together:
    """Does the parts of many sites, and decides at the first that can be trained together whether that is quicker here.

    quicker: what it has decided; given, there is no trial
    """

    def __init__(self, *, quicker: bool | None = None) -> None:
        self.quicker, self._fewest = quicker, _FEWEST if quicker is None else 2

    def run(self, parts: Sequence[Part[T]]) -> list[T | Exception | SystemExit]:
        """What each part returned or raised."""
        replays = [_Replay(part) for part in parts]
        waiting = replays
        while waiting:
            for replay in waiting:
                replay.advance()
            waiting = [replay for replay in waiting if replay.wish is not None]
            for group in _groups(waiting):
                self._answer(group)
        return [replay.found for replay in replays]

    def _answer(self, group: list[_Replay]) -> None:
        wishes = [(replay.part.training, replay.wish) for replay in group if replay.wish is not None]
        for replay, answer in zip(group, self._answers(wishes), strict=True):
            replay.answers.append(answer)

    def _answers(self, wishes: list[tuple[Training, Wish]]) -> list[Any]:
        if self.quicker is not False and (why := _alone_always(*wishes[0])):
            self.quicker = False
            log.info("sites are trained one after the other: %s", why)
        failed: BaseException | None = None
        if len(wishes) >= self._fewest and self.quicker is not False:
            trainers: Any = [training for training, _ in wishes]
            try:
                if self.quicker is None:
                    self.quicker = _is_quicker(trainers, [wish for _, wish in wishes])
                if self.quicker:
                    return list(train_together(trainers, [wish for _, wish in wishes]))
            except FAILURES as error:  # of a site's own code or of vmap: the loop says which
                failed = error
        answers = [_alone(training, wish) for training, wish in wishes]
        by_a_site = any(isinstance(answer, FAILURES) for answer in answers)
        if failed is not None and (isinstance(failed, CannotTogether) or not by_a_site):
            self.quicker = False
            log.info("sites are trained one after the other: %s", str(failed).split("\n", maxsplit=1)[0][:300])
        return answers


def _alone(training: Training, wish: Wish) -> Any:
    try:
        return wish.done(training)
    except FAILURES as error:
        return error


def _groups(waiting: list[_Replay]) -> Iterator[list[_Replay]]:
    """Those that can be trained together, and those that cannot, one by one."""
    groups: dict[Any, list[_Replay]] = {}
    for number, replay in enumerate(waiting):
        assert replay.wish is not None
        groups.setdefault(_kind(replay.part.training, replay.wish) or number, []).append(replay)
    yield from groups.values()


def _alone_always(training: Training, wish: Wish) -> str | None:
    """Why what the recipe asks for is done by the loop at every site; None where it need not be, or is no training."""
    if wish.method != "train":
        return None
    if wish.preserve:
        return "their optimizer goes on where it stopped in its last round (algorithm.preserve_optimizer_state)"
    if wish.merge:
        return "they take in parts of the global model while they train"
    return None if type(training) is LocalTrainer else "they have a training of their own"


def _kind(training: Training, wish: Wish) -> Any:
    """What trainings that can be done together have in common; None where one can only be done alone."""
    if wish.method != "train" or type(training) is not LocalTrainer or _alone_always(training, wish):
        return None
    settings, correction = training.settings, wish.correction
    if training.numerics.deterministic != "fast" or settings.optimizer.lr <= 0 or len(training.workload) == 0:
        return None
    if correction.assumes_sgd and settings.optimizer.kind != "sgd":  # the session refuses it
        return None
    same = settings.optimizer.model_dump_json(), settings.batch_size, settings.clip_norm, settings.evaluate
    terms = frozenset(correction.offset), correction.proximal, correction.apply
    return type(training.workload), training.model, training.numerics.model_dump_json(), same, terms


# -- whether it is worth it --------------------------------------------------------------------------------------------
def _is_quicker(trainers: Sequence[LocalTrainer], wishes: Sequence[Wish]) -> bool:
    """By a few steps of the first sites, both ways. Raises CannotTogether where the results differ by more than rounding."""
    device = trainers[0].numerics.device
    model = trainers[0].load_model(wishes[0].broadcast)
    _check_room(model, len(wishes), device)
    convolves = any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules())
    if convolves and device == "cpu":
        log.info("sites are trained one after the other: convolutions on a CPU are quicker so")
        return False
    clock = time.thread_time if device == "cpu" and trainers[0].numerics.threads == 1 else time.perf_counter
    trainers = [_short(trainer) for trainer in trainers]
    wishes = [replace(w, ctx=replace(w.ctx, overrides={**w.ctx.overrides, "steps": _TRIED})) for w in wishes]
    alone = [_timed(clock, lambda i=i: wishes[i].done(trainers[i])) for i in (0, 1)]  # type: ignore[misc]
    both = [_timed(clock, lambda: train_together(trainers, wishes)) for _ in (0, 1)]
    for i, (one, _) in enumerate(alone):
        _check_close(wishes[i].broadcast["params"], one.params, both[0][0][i].params)
    seconds = [alone[1][1] / _TRIED, both[1][1] / _TRIED / len(wishes)]
    log.info("a step of a site: %.3g s in the loop, %.3g s with %d sites together", *seconds, len(wishes))
    return device != "cpu" or seconds[1] < seconds[0]


def _check_room(model: nn.Module, sites: int, device: str) -> None:
    """Raises CannotTogether where values, gradients, correction and optimizer state of all sites would take too much memory."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    most = _LARGEST if device != "cuda" else torch.cuda.mem_get_info()[0] // (_KEPT * sites)
    if size > most:
        raise CannotTogether(f"found a model of {size >> 20} MiB, expected at most {most >> 20}")


def _short(trainer: LocalTrainer) -> LocalTrainer:
    settings = trainer.settings.model_copy(update={"evaluate": "never"})
    return replace(trainer, settings=settings, on_step=lambda done, planned: None)


def _timed(clock: Callable[[], float], function: Callable[[], Any]) -> tuple[Any, float]:
    started = clock()
    return function(), clock() - started


def _check_close(start: Tensors, one: Tensors, other: Tensors) -> None:
    apart = sum(float((one[n].double() - other[n].double()).square().sum()) for n in one) ** 0.5
    moved = sum(float((one[n].double() - start[n].double()).square().sum()) for n in one) ** 0.5
    if not apart <= _CLOSE * moved:
        raise CannotTogether(f"found parameters that differ by {apart:.2g} after moving by {moved:.2g} in a trial")


# -- the training ------------------------------------------------------------------------------------------------------
def train_together(trainers: Sequence[LocalTrainer], wishes: Sequence[Wish]) -> list[LocalResult]:
    """What `trainers[i]` would make of `wishes[i]`, all of one kind. Raises CannotTogether, or whatever vmap does, where it is not that."""
    first = trainers[0]
    model = first.load_model(wishes[0].broadcast)
    spied = _Spied(first.workload)
    with numerics.applied(first.numerics, wishes[0].ctx.seed):
        before = [_evaluation(t, w, model, w.broadcast, "before") for t, w in zip(trainers, wishes, strict=True)]
        load_groups(model, {group: wishes[0].broadcast[group] for group in MODEL_GROUPS})
        seed_all(wishes[0].ctx.seed)
        shared = {name: (t, t._version) for name, t in (*model.named_parameters(), *model.named_buffers())}
        drawn = generators()
        block = _Block(model.train(), spied.workload, trainers, wishes)
        block.train()
        _check_unchanged(model, shared)
        _check_not_drawn(drawn)
        for trainer in trainers[1:]:
            spied.check(trainer.workload)
        results = [block.result(i) for i in range(len(trainers))]
        after = [_evaluation(t, w, model, r, "after") for t, w, r in zip(trainers, wishes, results, strict=True)]
    noted = numerics.recorded(first.numerics) | {"vectorised": True}
    return [
        replace(result, metrics={**b, **result.metrics, **a}, numerics=noted)
        for result, b, a in zip(results, before, after, strict=True)
    ]


def _evaluation(trainer: LocalTrainer, wish: Wish, model: nn.Module, at: Any, when: Any) -> dict[str, float]:
    if trainer.settings.evaluate not in (when, "both") or not evaluates(trainer.workload):
        return {}
    groups = at.groups if isinstance(at, LocalResult) else at
    load_groups(model, {group: groups[group] for group in MODEL_GROUPS})
    seed_all(wish.ctx.seed)  # the training has drawn nothing
    return trainer.evaluation(model, when)


def _check_unchanged(model: nn.Module, shared: Mapping[str, tuple[Tensor, int]]) -> None:
    now = dict((*model.named_parameters(), *model.named_buffers()))
    changed = [n for n, (t, version) in shared.items() if now.get(n) is not t or t._version != version]
    if changed:
        raise CannotTogether(f"{changed[0]} changes in the model's forward pass")


def _check_not_drawn(drawn: Mapping[str, Any]) -> None:
    now = generators()
    if not (_same(drawn["torch"], now["torch"]) and _same(drawn["cuda"], now["cuda"])):
        raise CannotTogether("the data or the loss draw random numbers of torch's global generator")
    if drawn["python"] != now["python"] or not _same(list(drawn["numpy"][:1]), list(now["numpy"][:1])):
        raise CannotTogether("the data or the loss draw random numbers of a global generator")
    if (drawn["numpy"][1] != now["numpy"][1]).any() or drawn["numpy"][2:] != now["numpy"][2:]:
        raise CannotTogether("the data or the loss draw random numbers of numpy's global generator")


_PADS = dict[
    tuple[type[nn.Module], type], bool
]()  # whether rows of a model's batch have no part in each other's output


class _Site:
    """One site's place in a block."""

    def __init__(self, number: int, trainer: LocalTrainer, wish: Wish) -> None:
        self.number, self.trainer, self.done, self.total = number, trainer, 0, 0.0
        self.planned: int | None = wish.ctx.overrides.get("steps", wish.steps or trainer.settings.steps)
        epochs = None if self.planned is not None else trainer.settings.epochs or 1
        make, generator = batches_of(trainer, wish.ctx.seed)
        self.batches = iter(GeneratedStream(make, generator, epochs=epochs, ended=lambda: self.done == self.planned))
        self.params: dict[str, Tensor] = {}


class _Block:
    """The stacked parameters of sites, (sites, *shape) by name, of which those are left that still train."""

    def __init__(
        self, model: nn.Module, workload: Any, trainers: Sequence[LocalTrainer], wishes: Sequence[Wish]
    ) -> None:
        self.workload, self.kinds = workload, (type(model), type(trainers[0].workload))
        self.settings, self.correction = trainers[0].settings, wishes[0].correction
        self.device = trainers[0].numerics.device
        self.broadcasts = [wish.broadcast for wish in wishes]
        self.sites = [_Site(i, t, w) for i, (t, w) in enumerate(zip(trainers, wishes, strict=True))]
        longest = sorted(self.sites, key=lambda s: s.planned or len(s.trainer.workload), reverse=True)
        self.active = longest  # so that those that end are behind the others
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        order = [site.number for site in longest]
        self.values = [self._stacked([wishes[i].broadcast["params"][n] for i in order]) for n in self.names]
        self.offsets = self._offsets([wishes[i].correction.offset for i in order])
        if self.correction and self.correction.assumes_sgd:
            warn_of_momentum(self.settings.optimizer.momentum)
        self.starts = [value.clone() for value in self.values] if self.correction.proximal else []
        self.fixed = self._fixed(model, [wishes[i].broadcast for i in order])
        self.optimizer: Plain = make_optimizer(self.settings.optimizer, self.values)
        self.losses = torch.zeros(len(order), dtype=torch.float32 if self.device == "mps" else torch.float64)
        self.losses = self.losses.to(self.device)
        self._call = vmap(_Loss(model, workload).of, in_dims=(0, 0, 0), randomness="error")

    def _stacked(self, tensors: list[Tensor]) -> Tensor:
        return torch.stack(tensors).to(self.device)

    def _offsets(self, offsets: list[Tensors]) -> dict[int, Tensor]:
        """By the number of the parameter."""
        found = {}
        for k, (name, value) in enumerate(zip(self.names, self.values, strict=True)):
            if name in offsets[0]:
                found[k] = self._stacked([offset[name].to(value.dtype) for offset in offsets])
                if found[k].shape != value.shape or not bool(torch.isfinite(found[k]).all()):
                    raise CannotTogether(f"the correction of {name} does not fit")
        return found

    def _fixed(self, model: nn.Module, broadcasts: list[Groups]) -> dict[str, Tensor]:
        """Frozen parameters and buffers that are not the same at all sites."""
        found = {}
        for group in ("frozen", "buffers"):
            for name, tensor in broadcasts[0][group].items():
                all_sites = [broadcast[group][name] for broadcast in broadcasts]
                if not all(t is tensor or torch.equal(t, tensor) for t in all_sites):
                    found[name] = self._stacked(all_sites)
        return found

    def train(self) -> None:
        while batches := self._batches():
            losses, gradients = self._gradients(batches)
            self._step(gradients)
            self.losses += losses
            for site in self.active:
                site.done += 1
                site.trainer.on_step(site.done, site.planned)

    def _batches(self) -> list[Any]:
        """The next batch of every site that has one; the others are done."""
        batches = [next(site.batches, None) for site in self.active]
        rows = [row for row, batch in enumerate(batches) if batch is not None]
        if len(rows) < len(self.active):
            self._narrow(rows)
        return [batches[row] for row in rows]

    def _narrow(self, rows: list[int]) -> None:
        """Go on with these sites."""
        for row, site in enumerate(self.active):
            site.params = {name: value[row] for name, value in zip(self.names, self.values, strict=True)}
            site.total = float(self.losses[row])
        at: Any = slice(len(rows)) if rows == list(range(len(rows))) else torch.tensor(rows, device=self.device)
        self.active = [self.active[row] for row in rows]
        self.values = [value[at] for value in self.values]
        self.starts = [start[at] for start in self.starts]
        self.offsets = {k: offset[at] for k, offset in self.offsets.items()}
        self.fixed = {name: value[at] for name, value in self.fixed.items()}
        self.losses = self.losses[at]
        self.optimizer.narrow(self.values, at)

    def _gradients(self, batches: list[Any]) -> tuple[Tensor, list[Tensor | None]]:
        """(sites,) losses, and by parameter (sites, *shape) gradients."""
        kinds = _by_shape(batches)
        if len(kinds) > 1 and hasattr(self.workload, "padded"):
            batches = self._padded(batches)
            kinds = _by_shape(batches)
        if len(kinds) == 1:
            return self._of(self.values, self.fixed, batches)
        losses = torch.empty_like(self.losses)
        gradients: list[Tensor | None] = [None] * len(self.values)
        for rows in kinds.values():
            at = torch.tensor(rows, device=self.device)
            fixed = {name: value[at] for name, value in self.fixed.items()}
            some, parts = self._of([value[at] for value in self.values], fixed, [batches[row] for row in rows])
            losses[at] = some.to(losses.dtype)
            for k, part in enumerate(parts):
                if part is not None:
                    whole = gradients[k] = torch.zeros_like(self.values[k]) if gradients[k] is None else gradients[k]
                    whole[at] = part  # type: ignore[index]
        return losses, gradients

    def _padded(self, batches: list[Any]) -> list[Any]:
        """`batches`, as large as the largest of them where the workload can make them so without another loss."""
        sizes = [len(next(iter(_leaves(batch)))) for batch in batches]
        key, most, pad = self.kinds, max(sizes), self.workload.padded
        if _PADS.get(key) is False:
            return batches
        found = [pad(batch, most) if size < most else batch for batch, size in zip(batches, sizes, strict=True)]
        if any(batch is None for batch in found):
            return batches
        if key not in _PADS:
            row = sizes.index(min(sizes))
            one, other = (self._at(row, batch) for batch in (batches[row], found[row]))
            _PADS[key] = bool(torch.isclose(one, other, rtol=1e-4, atol=1e-6))
        return found if _PADS[key] else batches

    @torch.no_grad()
    def _at(self, row: int, batch: Any) -> Tensor:
        """The loss of one site's batch."""
        values = {name: value[row : row + 1] for name, value in zip(self.names, self.values, strict=True)}
        fixed = {name: value[row : row + 1] for name, value in self.fixed.items()}
        loss: Tensor = self._call(values, fixed, _stack([batch], self.device))[0]
        return loss

    def _of(
        self, values: list[Tensor], fixed: dict[str, Tensor], batches: list[Any]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The same of sites whose batches have the same shapes."""
        leaves = [value.detach().requires_grad_() for value in values]
        stacked = _stack(batches, self.device)
        versions = [tensor._version for tensor in fixed.values()]
        losses = self._call(dict(zip(self.names, leaves, strict=True)), fixed, stacked)
        if versions != [tensor._version for tensor in fixed.values()]:
            raise CannotTogether("buffers change in the model's forward pass")
        if losses.dim() != 1:
            raise CannotTogether(f"found a loss of shape {list(losses.shape[1:])}, expected a scalar")
        return losses.detach(), list(torch.autograd.grad(losses.sum(), leaves, allow_unused=True))

    @torch.no_grad()
    def _step(self, gradients: list[Tensor | None]) -> None:
        correction = self.correction
        if correction and correction.apply == "gradient":
            for k, term in self._terms():
                gradient = gradients[k]
                gradients[k] = term if gradient is None else gradient + term
        if self.settings.clip_norm is not None:
            _clip([g for g in gradients if g is not None], self.settings.clip_norm)
        for value, gradient in zip(self.values, gradients, strict=True):
            value.grad = gradient
        self.optimizer.step()
        if correction and correction.apply == "after_step":
            for k, term in self._terms():
                self.values[k].sub_(term, alpha=self.settings.optimizer.lr)

    def _terms(self) -> Iterator[tuple[int, Tensor]]:
        """offset + μ(w − x) by parameter."""
        for k, value in enumerate(self.values):
            offset = self.offsets.get(k)
            if self.correction.proximal:
                pull = (value - self.starts[k]) * self.correction.proximal
                yield k, pull if offset is None else pull + offset
            elif offset is not None:
                yield k, offset

    def result(self, number: int) -> LocalResult:
        site, broadcast = self.sites[number], self.broadcasts[number]
        if not site.done:
            raise CannotTogether("a site has taken no step")
        rates = [self.settings.optimizer.lr] * site.done
        return LocalResult(
            {name: value.cpu() for name, value in site.params.items()},
            {name: value.clone() for name, value in broadcast["frozen"].items()},
            {name: value.clone() for name, value in broadcast["buffers"].items()},
            examples=len(site.trainer.workload),
            steps=site.done,
            lr_sum=sum(rates, 0.0),
            metrics={"loss": site.total / site.done},
        )


def _clip(gradients: list[Tensor], most: float) -> None:
    """As `torch.nn.utils.clip_grad_norm_`, site by site."""
    norms = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients]
    total = torch.linalg.vector_norm(torch.stack(norms), dim=0)  # (sites,)
    factor = torch.clamp(most / (total + 1e-6), max=1.0)
    for g in gradients:
        g.mul_(factor.view(-1, *[1] * (g.dim() - 1)))


class _Loss(nn.Module):
    """The loss of a model whose tensors are given by name."""

    def __init__(self, model: nn.Module, workload: Any) -> None:
        super().__init__()
        self.model, self._workload = model, workload

    def forward(self, batch: Any) -> Tensor:
        loss: Tensor = self._workload.loss(self.model, batch)
        return loss

    def of(self, values: Tensors, fixed: Tensors, batch: Any) -> Tensor:
        named = {f"model.{name}": tensor for name, tensor in (*values.items(), *fixed.items())}
        found: Tensor = functional_call(self, named, (batch,))
        return found


# -- batches -----------------------------------------------------------------------------------------------------------
def _leaves(batch: Any) -> list[Tensor]:
    if type(batch) is tuple and all(isinstance(part, Tensor) for part in batch):
        return list(batch)
    found: list[Tensor] = []
    mapped(lambda tensor: found.append(tensor) or tensor, batch)  # type: ignore[func-returns-value]
    return found


def _by_shape(batches: list[Any]) -> dict[Any, list[int]]:
    """Shapes and dtypes of a batch's tensors -> which batches have them."""
    kinds: dict[Any, list[int]] = {}
    for row, batch in enumerate(batches):
        kinds.setdefault(tuple((t.shape, t.dtype) for t in _leaves(batch)), []).append(row)
    return kinds


def _stack(batches: list[Any], device: str) -> Any:
    """One batch whose tensors have a site's in each row. Raises CannotTogether where there is something else in them."""
    if not _only_tensors(batches[0]):
        raise CannotTogether("found a batch of more than tensors")
    columns = [torch.stack(column) for column in zip(*map(_leaves, batches), strict=True)]
    if device == "cuda":
        columns = [column.pin_memory().to(device, non_blocking=True) for column in columns]
    left = iter(column.to(device) for column in columns)
    return mapped(lambda _: next(left), batches[0])


def _only_tensors(batch: Any) -> bool:
    parts = batch.values() if isinstance(batch, Mapping) else batch
    return isinstance(batch, Tensor) or (
        isinstance(batch, (tuple, list, Mapping)) and all(_only_tensors(part) for part in parts)
    )


# -- workloads ---------------------------------------------------------------------------------------------------------
class _Spied:
    """`workload`, whose attributes that are read are noted: what a loss reads must be the same at all sites."""

    def __init__(self, workload: Any) -> None:
        kind: Any = type(workload)
        self._read = set[str]()

        def noted(self_: Any, name: str, read: set[str] = self._read) -> Any:
            read.add(name)
            return kind.__getattribute__(self_, name)

        self.workload: Any = object.__new__(type(kind)(kind.__name__, (kind,), {"__getattribute__": noted}))
        self.workload.__dict__ = workload.__dict__
        self._own = workload.__dict__
        self._read.clear()

    def check(self, other: Any) -> None:
        """Raises CannotTogether where the loss reads something that is different in `other`."""
        theirs = vars(other)
        for name in self._read:
            if name == "__dict__" or not _same(self._own.get(name), theirs.get(name)):
                raise CannotTogether(f"the loss reads {name}, which is not the same at all sites")


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, nn.Module):
        return _same(vars(one), vars(other))
    return bool(one == other)
