"""The session: what happens around anybody's training code while it trains.

    with Session(model, correction=correction, steps=20) as session:
        metrics = train(model, session.data(loader), config)  # no word of fedflow in it
    session.done, session.lr_sum

It sees optimizer steps through PyTorch's own global step hooks, and knows its model's by the identity of the parameters:
other optimizers, and the sessions of other threads, are told apart; nothing is patched. Whatever ends the block, an
exception included, the hooks are gone after it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fedflow.algorithm import NO_CORRECTION, NO_MERGE, Correction, Merge
from fedflow.errors import SiteError, TrainingInvalid, field_error
from fedflow.local.correction import Corrector
from fedflow.local.data import DataView, GeneratedStream, Stream
from fedflow.local.model import model_groups
from fedflow.local.optimizers import SGD, Plain
from fedflow.local.state import Memory, Preserved

__all__ = ["EnoughSteps", "Session", "current", "warn_of_momentum"]

log = logging.getLogger(__name__)

Progress = Callable[[int, int | None], None]
S = TypeVar("S", bound=Stream)
AnyOptimizer = Optimizer | Plain

_PATIENCE = 1000  # times that data may end without a step in between: epochs that are left over, or a loop without end


class EnoughSteps(BaseException):
    """Ends training code that goes on after its last step; only the session that raised it catches it."""


class Session:
    """One training of `model`, whose values now are the broadcast.

    correction: what is added to the gradients; none: the training is untouched, to the bit
    merge:      what the parameters take in after some of the steps
    steps:      exactly so many completed optimizer steps; None = as many as the code takes
    strict:     code that had to be stopped, or data that cannot be resumed, is an error and not a warning
    hooks:      False for a loop that calls `before_step` and `after_step` itself
    memory:     where state is preserved; None = nothing is
    on_step:    called after every completed step with (steps done, steps planned or None); may raise to stop
    place:      run, round, site: for errors

    A *step* is one completed `step()` of the one optimizer that holds parameters of the model; a step that a loss scaler
    skips is none. Raises TrainingInvalid where the code cannot take part: two optimizers over the model, LBFGS, an
    adaptive optimizer under a correction that assumes SGD, parameters made anew, `requires_grad` changed, no step at all.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        correction: Correction = NO_CORRECTION,
        merge: Merge = NO_MERGE,
        steps: int | None = None,
        strict: bool = False,
        hooks: bool = True,
        memory: Memory | None = None,
        on_step: Progress = lambda done, planned: None,
        place: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.planned, self.strict, self.on_step = model, steps, strict, on_step
        self.done, self.lr_sum = 0, 0.0
        self._hooks = hooks
        self.correction, self.merge, self.stopped = correction, merge, False
        self.numerics: dict[str, Any] = {}  # what decided the bits besides the recipe's numerics
        self._corrector = Corrector(model, correction) if correction else None
        self._parameters = dict(model.named_parameters())
        self._names = {id(p): name for name, p in self._parameters.items()}
        self._trainable = {name: p.requires_grad for name, p in self._parameters.items()}
        self._optimizer: AnyOptimizer | None = None
        self._rate, self._rates = 0.0, dict[int, float]()
        self._stepped: tuple[list[int], set[int]] = ([], set())
        self._corrected = self._stepping = self._manual = False
        self._streams: list[Stream] = []
        self._ends = 0
        self._refusal: TrainingInvalid | None = None
        self._buffers: dict[str, Tensor] = {}
        self._place = dict(place or {})
        self._preserved = Preserved(memory, self._names) if memory is not None else None

    # -- around the code
    def __enter__(self) -> Session:
        if self._preserved is not None:
            self._preserved.restore_generators()
        if self._hooks:
            _install(self)
        _LOCAL.sessions = [*getattr(_LOCAL, "sessions", []), self]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> bool:
        if self._hooks:
            _uninstall(self)
        _LOCAL.sessions = [s for s in _LOCAL.sessions if s is not self]
        ended = self.ended(error)
        if error is None or ended:
            self.stopped |= ended
            self._finish()
        return ended

    def ended(self, error: BaseException | None) -> bool:
        """Whether `error` is how code ends that goes on after its last step: it is stopped, or asks for a next batch in vain."""
        if isinstance(error, EnoughSteps):
            return error.args[0] is self
        return isinstance(error, StopIteration) and self.done == self.planned and bool(self._streams)

    def data(self, loader: Any) -> DataView:
        """`loader` as a stream that goes on where the site stopped reading, and ends once `steps` steps are complete."""
        return self._register(
            DataView(loader, strict=self.strict, epochs=1 if self.planned is None else None, **self._reading())
        )

    def stream(
        self, make: Callable[[], Iterable[Any]], generator: torch.Generator, epochs: int | None
    ) -> GeneratedStream:
        """The same of epochs that `make()` shuffles with `generator`: so many of them, or until the steps are complete."""
        return self._register(GeneratedStream(make, generator, epochs=epochs, **self._reading()))

    def _reading(self) -> dict[str, Any]:
        return {
            "place": self._preserved.place(len(self._streams)) if self._preserved else None,
            "ended": lambda: self.done == self.planned,
            "on_begin": self._begin_reading,
            "on_end": self._end_reading,
        }

    def _register(self, stream: S) -> S:
        self._streams.append(stream)
        return stream

    def track(self, *objects: Any) -> None:
        """Announce a scheduler (anything with state_dict and load_state_dict) that does not refer to its optimizer."""
        if self._preserved is not None:
            self._preserved.track(objects)

    def _begin_reading(self) -> None:
        if self._preserved is not None:
            self._preserved.restore_generators()

    def _end_reading(self) -> None:
        self._ends += 1
        if self._ends > _PATIENCE:
            self.stopped = True
            raise EnoughSteps(self)
        if self._preserved is not None and self.planned is None:
            self._preserved.note_generators()

    # -- at every step
    def before_step(self, optimizer: AnyOptimizer, args: Any = (), kwargs: Any = None) -> Any:
        """Before `optimizer.step(*args, **kwargs)`; returns the arguments to use instead, or None."""
        if optimizer is not self._optimizer:
            self._adopt(optimizer)
        if self.done == self.planned:
            self.stopped = True
            raise EnoughSteps(self)
        self._stepping = True
        if self._hooks:
            self._check_trainable()
        if self._preserved is not None:
            self._preserved.restore(optimizer)
        self._rate = float(optimizer.param_groups[0]["lr"])
        if self._corrector is not None and self.correction.apply == "after_step":
            self._rates = {id(p): float(g["lr"]) for g in optimizer.param_groups for p in g["params"]}
        self._check_rates(optimizer)
        if self._corrector is None:
            return None
        closure = _closure(args, kwargs or {})
        if closure is not None and not self._corrected:
            return _with_closure(args, kwargs or {}, partial(self._closure, closure, optimizer))
        self.correct_gradients(optimizer)
        return None

    def correct_gradients(self, optimizer: AnyOptimizer, *, again: bool = False) -> None:
        """Add the correction to the gradients now (a loop's place before its clipping); the step will not add it again.

        again: also if the last ones that were corrected were never stepped (a loss scaler skipped them)
        """
        if self._corrector is not None and (again or not self._corrected):
            sizes = [len(group["params"]) for group in optimizer.param_groups]
            if self._stepped[0] != sizes:
                self._stepped = sizes, {id(p) for group in optimizer.param_groups for p in group["params"]}
            self._corrector.before_step(self._stepped[1], getattr(optimizer, "grad_scale", None))
            self._corrected = True

    def after_step(self, optimizer: AnyOptimizer) -> None:
        """After `optimizer.step()`; nothing where it is over already: a subclass's step around its parent's is one."""
        if not self._stepping:
            return
        self._corrected = self._stepping = False
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and float(found_inf):
            return
        if self._corrector is not None:
            self._corrector.after_step(lambda p: self._rates.get(id(p)))
        self._count(self._rate)

    def correct(self, model: nn.Module, lr: float) -> None:
        """For loops that step without a torch optimizer: call after each step that was taken with learning rate `lr`.

        w ← w − lr·(offset + μ(w − x)), which for plain SGD is the corrected gradient's step where the correction is an
        offset. Counts the step.
        """
        if self._optimizer is not None:
            raise self._invalid(
                "session.correct",
                "steps of a torch optimizer too",
                "one of the two",
                "remove the calls of session.correct",
            )
        if self.done == self.planned:
            self.stopped = True
            raise EnoughSteps(self)
        self._manual = True
        if self._corrector is not None:
            with torch.no_grad():
                for name, term in self._corrector.terms().items():
                    self._parameters[name].sub_(term, alpha=lr)
        self._count(lr)

    def _count(self, lr: float) -> None:
        self.done += 1
        self.lr_sum += lr
        self._ends = 0
        if self.merge and self.done == self.merge.after:
            self._take_in()
        for stream in self._streams:
            stream.commit()
        if self.done == self.planned and self._hooks:  # a loop of our own reads no batch more
            self._buffers = {n: b.clone() for n, b in model_groups(self.model)["buffers"].items()}
        if self.done == self.planned and self._preserved is not None:
            self._preserved.note_generators()
        self.on_step(self.done, self.planned)

    @torch.no_grad()
    def _take_in(self) -> None:
        for name, value in self.merge.into({n: self._parameters[n].cpu() for n in self.merge.values}).items():
            self._parameters[name].copy_(value)

    def _closure(self, closure: Callable[[], Any], optimizer: AnyOptimizer) -> Any:
        with torch.enable_grad():
            loss = closure()
        self.correct_gradients(optimizer)
        return loss

    # -- what is not accepted
    def _adopt(self, optimizer: AnyOptimizer) -> None:
        found = type(optimizer).__name__
        if self._manual:
            raise self._invalid(
                "session.correct",
                "steps of a torch optimizer too",
                "one of the two",
                "remove the calls of session.correct",
            )
        if self._optimizer is not None:
            pair = f"{type(self._optimizer).__name__} and {found}"
            raise self._invalid(
                "optimizer", pair, "one optimizer over the model's parameters", "make one of several groups"
            )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise self._invalid(
                "optimizer",
                found,
                "one whose step is one evaluation of the gradient",
                "use SGD or Adam: LBFGS takes many",
            )
        if self.correction and self.correction.assumes_sgd:
            self._check_sgd(optimizer)
        self._optimizer, self._stepped = optimizer, ([], set())

    def _check_sgd(self, optimizer: AnyOptimizer) -> None:
        if not isinstance(optimizer, (torch.optim.SGD, SGD)):
            raise self._invalid(
                "optimizer",
                type(optimizer).__name__,
                "SGD, for which this algorithm's correction holds",
                "use torch.optim.SGD, or set allow_adaptive: true in the algorithm",
            )
        warn_of_momentum(max(group["momentum"] for group in optimizer.param_groups))

    def _check_rates(self, optimizer: AnyOptimizer) -> None:
        if self.correction and self.correction.assumes_sgd and len(optimizer.param_groups) > 1:
            rates = sorted({float(group["lr"]) for group in optimizer.param_groups})
            if len(rates) > 1:
                raise self._invalid(
                    "lr", rates, "the same in all parameter groups", "use one learning rate with this algorithm"
                )

    def _check_trainable(self) -> None:
        for name, p in self._parameters.items():
            if p.requires_grad is not self._trainable[name]:
                word = "frozen" if self._trainable[name] else "made trainable"
                raise self._invalid(
                    name,
                    f"{word} during the training",
                    "requires_grad as the model's factory left it",
                    "decide it there",
                )

    def _finish(self) -> None:
        if self._refusal is not None:  # and the code went on
            raise self._refusal
        self._check_trainable()
        self._check_same_parameters()
        if self.done == 0:
            raise self._error(
                "no optimizer step was taken over the model's parameters; train the model that was handed over, with data"
            )
        if self.correction and self.correction.assumes_sgd and self.lr_sum <= 0:
            raise self._invalid("lr", self.lr_sum, "a positive sum over the steps", "raise the learning rate")
        if self.lr_sum == 0 and self._preserved is None:
            raise self._invalid("lr", 0.0, "a positive learning rate in at least one step", "raise it")
        if self.planned is not None and self.done < self.planned:
            raise self._invalid(
                "steps",
                self.done,
                f"exactly {self.planned}",
                "loop over the data until it ends, without a limit of your own",
            )
        if self.merge and self.done <= self.merge.after:
            raise self._invalid(
                "steps", self.done, f"more than the {self.merge.after} before the merge", "take more, or merge earlier"
            )
        if self.stopped:
            self._take_back()
            self._warn_stopped()
        if self._preserved is not None:
            self._preserved.capture(self._optimizer, [stream.place() for stream in self._streams])

    def _check_same_parameters(self) -> None:
        now = dict(self.model.named_parameters())
        changed = [name for name, p in self._parameters.items() if now.get(name) is not p]
        changed += [name for name in now if name not in self._parameters]
        if changed:
            raise self._invalid(
                ", ".join(changed[:5]),
                "parameters made anew by the training",
                "the model's own",
                "change them in place",
            )

    @torch.no_grad()
    def _take_back(self) -> None:
        """Buffers as the last step left them: code that was stopped has read a batch more, which moved statistics."""
        for name, buffer in model_groups(self.model)["buffers"].items():
            if name in self._buffers:
                buffer.copy_(self._buffers[name])

    def _warn_stopped(self) -> None:
        text = (
            f"the training went on after its {self.planned} steps and was stopped: what it would have done and returned after "
            "its loop is lost; read the data that fedflow hands over"
        )
        if self.strict:
            raise TrainingInvalid(text, **self._place)
        log.warning("%s", text)

    def _invalid(self, field: str, found: object, expected: str, fix: str) -> TrainingInvalid:
        self._refusal = TrainingInvalid(field_error(field, found, expected, fix), **self._place)
        return self._refusal

    def _error(self, text: str) -> SiteError:
        return SiteError(text, **self._place)

    # -- afterwards
    def groups(self) -> dict[str, dict[str, Tensor]]:
        """The model's tensors by group, on the CPU, in the ordinary layout."""
        return {
            g: {n: t.cpu().contiguous() for n, t in tensors.items()} for g, tensors in model_groups(self.model).items()
        }


def warn_of_momentum(momentum: float) -> None:
    """Of a correction that assumes plain SGD."""
    if momentum:
        log.warning(
            "the correction assumes plain SGD; with momentum %g its estimate inflates by up to %g",
            momentum,
            1 / (1 - momentum),
        )


def current() -> Session | None:
    """The innermost session of this thread, for training code that wants to know (`correct`, `track`)."""
    sessions: list[Session] = getattr(_LOCAL, "sessions", [])
    return sessions[-1] if sessions else None


# -- hooks: one for the process, while any session lives ---------------------------------------------------------------
_LOCAL = threading.local()
_LOCK = threading.Lock()
_OWNERS: dict[int, Session] = {}  # id of a parameter -> its session, which keeps the parameter alive
_HANDLES: list[Any] = []


def _install(session: Session) -> None:
    ids = session._names
    with _LOCK:
        if any(i in _OWNERS for i in ids):
            raise session._error("the model is in another session already; give each training a model of its own")
        if not _OWNERS:
            _HANDLES.append(register_optimizer_step_pre_hook(_before))
            _HANDLES.append(register_optimizer_step_post_hook(_after))
        _OWNERS.update(dict.fromkeys(ids, session))


def _uninstall(session: Session) -> None:
    with _LOCK:
        for i in session._names:
            _OWNERS.pop(i, None)
        if not _OWNERS:
            for handle in _HANDLES:
                handle.remove()
            _HANDLES.clear()


def _owner(optimizer: Optimizer) -> Session | None:
    parameters: Iterable[Any] = (p for group in optimizer.param_groups for p in group["params"])
    return next((session for p in parameters if (session := _OWNERS.get(id(p))) is not None), None)


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
    session = _owner(optimizer)
    return None if session is None else session.before_step(optimizer, args, kwargs)


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    session = _owner(optimizer)
    if session is not None:
        session.after_step(optimizer)


def _closure(args: Any, kwargs: Mapping[str, Any]) -> Callable[[], Any] | None:
    """The closure among the arguments of `step`, of which the first is the optimizer."""
    found: Callable[[], Any] | None = args[1] if len(args) > 1 else kwargs.get("closure")
    return found


def _with_closure(args: Any, kwargs: Mapping[str, Any], closure: Callable[[], Any]) -> Any:
    if len(args) > 1:
        return (args[0], closure, *args[2:]), dict(kwargs)
    return args, {**kwargs, "closure": closure}
