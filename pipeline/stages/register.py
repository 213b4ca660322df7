"""The stage `register`: makes the finished model of a recipe a version in the registry."""

from __future__ import annotations

from pipeline.params import Places, load_recipe
from pipeline.stages import main


def register(recipe_name: str) -> None:
    """Registers, and says in one line where the model is found and who holds the alias."""
    from pipeline.registry import register as registry  # brings torch and MLflow: seconds

    done = registry.register(load_recipe(recipe_name), Places.from_env())
    print(f"registered {done.name} version {done.version} ({done.decision})")


if __name__ == "__main__":
    main(register)
