"""The recipe: typed, validated, and importable without PyTorch.

Read in this order:

1. `recipe.py`: `Recipe` and its sections, `load_recipe`, `dump_recipe`.
2. `options.py`: `DualStreamOptions`, the `train` section, which the trainer's configuration inherits.
3. `yaml_file.py`: reading YAML, overrides such as `train.seed=1`, and errors that name all problems at once.

`shipped.py` finds the recipes that come with vitos. docs/recipes.md lists all keys.
"""
