"""Which recipes a site trains: of those that its configuration allows, what its owner has approved once, and what the owner's policy lets in."""

from __future__ import annotations

import getpass
import json
from pathlib import Path

from fedflow.engine.audit import append
from fedflow.errors import RecipeRefused
from fedflow.recipe import Recipe, Review, SiteConfig
from fedflow.store.records import utc_now
from fedflow.types import canonical_json

__all__ = ["check_allowed", "decide", "verdict"]


def check_allowed(recipe: Recipe, config: SiteConfig, run: str) -> None:
    """Raises RecipeRefused where the site of `config` does not do what the recipe asks for, or reviews recipes, and neither its owner nor
    its policy has approved this one."""
    if (why := config.objection(recipe)) is not None:
        raise RecipeRefused(f"{why}; change the recipe, or ask the site's owner", site=config.name)
    if config.review is not None and (why := refusal(recipe, config.review)) is not None:
        raise RecipeRefused(
            f"recipe {recipe.digest()} is not approved here ({why}); the site's owner reads and approves it with "
            f"`fedflow site review {run} --approve`",
            site=config.name,
        )


def refusal(recipe: Recipe, review: Review) -> str | None:
    """Why a site with that review does not train `recipe`; None if it does."""
    decided = _decided(Path(review.approved)).get(recipe.digest())
    if decided is False:
        return "its approval was revoked"
    if decided:
        return None
    return "nobody has approved it" if review.policy is None else review.policy.objection(recipe)


def verdict(recipe: Recipe, config: SiteConfig) -> str:
    """Whether the site of `config` trains it, in words."""
    review = config.review
    if (why := config.objection(recipe)) is not None:
        return f"refused: {why}"
    if review is None:
        return "trained: this site reviews nothing"
    if (why := refusal(recipe, review)) is not None:
        return f"refused: {why}"
    return "approved" if recipe.digest() in _decided(Path(review.approved)) else "approved by policy"


def decide(recipe: Recipe, review: Review, approved: bool) -> str:
    """Write down that `recipe` is approved from now on, or not any more; its digest."""
    digest = recipe.digest()
    line = {"at": utc_now().isoformat(), "by": getpass.getuser(), "recipe": recipe.name}
    append("review.approved", Path(review.approved), canonical_json({**line, "digest": digest, "approved": approved}))
    return digest


def _decided(path: Path) -> dict[str, bool]:
    """Digest of a recipe -> what was decided last."""
    if not path.exists():
        return {}
    lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return {line["digest"]: bool(line["approved"]) for line in lines}
