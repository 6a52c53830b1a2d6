"""One round of a recipe at one site alone, in a folder of its own: what its owner may see before anything is sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedflow.engine.rounds import close_round, commit_round, federation_view, new_opening, start_run, survey
from fedflow.engine.site import SiteWork, site_step
from fedflow.local.model import build_model
from fedflow.recipe import NO_MODEL, Recipe, SiteConfig
from fedflow.schedules import Everyone
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from fedflow.store.records import Manifest, Plan, TaskRecord, UpdateManifest, utc_now
from fedflow.store.tensors import read_tensors
from fedflow.tensors import non_finite
from fedflow.types import SiteId

__all__ = ["Tried", "try_recipe"]


@dataclass(frozen=True)
class Tried:
    """What a site would have sent in one phase. objection: why the coordinator would not count it; None if it would."""

    phase: str
    update: UpdateManifest
    objection: str | None

    def row(self) -> dict[str, Any]:
        """As JSON."""
        sent = {group: {"bytes": ref.size, "digest": ref.digest} for group, ref in self.update.groups.items()}
        fields = self.update.model_dump(mode="json", include={"examples", "steps", "seconds", "metrics", "scalars"})
        return {"phase": self.phase, **fields, "would_send": sent, "objection": self.objection}


def try_recipe(
    recipe: Recipe, config: SiteConfig, folder: str, sites: Sequence[SiteId] = (), **given: Any
) -> list[Tried]:
    """The first round of `recipe` at the site of `config`, on its own data, from the model that the factory makes.

    Store, state and journal lie in `folder`, which the caller deletes; nothing is read or written elsewhere, and the site's own
    state stays as it is. Phases behind the first begin with what this site alone has sent; a phase that would not count is the last, and
    the first is, where the algorithm names another site.

    sites: of the federation, as the workload is told, besides this one and those of which the recipe speaks
    given: progress, workload and model, as `site_step` takes them
    Raises what `site_step` raises.
    """
    alone = _alone(recipe)
    if recipe.model.path != NO_MODEL:
        build_model(recipe.model.path, recipe.model.args, seed=recipe.seed, allowed=config.allowed_imports)
    everybody = sorted({config.name, *recipe.named_sites, *sites})
    journal = start_run(ObjectStore(f"{folder}/store"), "try", alone, everybody)
    last = alone.phases[0] if set(recipe.algorithm.names.values()) - {config.name} else alone.phases[-1]
    here = config.model_copy(
        update={
            "store": journal.store.url,
            "store_options": {},
            "state": f"{folder}/state",
            "key": None,
            "coordinator_key": None,
            "review": None,
            "audit": None,
        }
    )
    found: list[Tried] = []
    for phase in alone.phases:
        plan = journal.put_plan(_plan(journal, recipe, phase, config.name))
        opening = journal.put_opening(plan, new_opening(alone, 1, at=utc_now()))
        update = site_step(SiteWork("try", 0, phase), here, unhurried=True, **given)
        seen = survey(journal, plan)
        bad = non_finite({group: read_tensors(journal.store, ref) for group, ref in update.groups.items()})
        found.append(Tried(phase, update, seen.rejected.get(config.name) or (f"not finite: {bad}" if bad else None)))
        if found[-1].objection or phase == last:
            break
        commit_round(journal, plan, close_round(journal, plan, opening, seen, why="tried"))
    return found


def _alone(recipe: Recipe) -> Recipe:
    """The recipe without what only the server has or a federation can do: checkpoints, its evaluation, schedule and quorums."""
    other: Mapping[str, Any] = {
        "rounds": 1,
        "schedule": Everyone(),
        "quorum": None,
        "min_sites": 1,
        "required_sites": [],
        "checkpoint": None,
        "checkpoints": {},
        "evaluation": None,
    }
    return recipe.model_copy(update=dict(other))


def _plan(journal: Journal, recipe: Recipe, phase: str, site: SiteId) -> Plan:
    """As the coordinator would write it, for one site."""
    head = journal.head(recipe.phases)
    assert isinstance(head, Manifest)
    wanted = recipe.schedule.plan(0, federation_view(journal, head, {}, {}), recipe.seed).tasks.get(site)
    task = TaskRecord(steps=wanted.steps, overrides=dict(wanted.overrides)) if wanted else TaskRecord()
    accepted = head.sites[site].accepted if site in head.sites else None
    return Plan(
        run=journal.run,
        nonce=journal.begun.nonce,
        round=0,
        phase=phase,
        parent=head.digest(),
        broadcast=head.broadcast,
        tasks={site: task.model_copy(update={"state_base": accepted})},
        quorum=1,
        accept_bases=[0],
        late="drop",
        amendments=0,
        num_sites=len(journal.sites()),
    )
