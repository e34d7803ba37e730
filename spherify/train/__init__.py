"""Training and evaluation: recipes as data, a loop that loses nothing, and what one sees of it."""

from spherify.train.evaluate import Evaluation, evaluate
from spherify.train.fit import Fitted, fit
from spherify.train.loaders import Loaders, loaders_for
from spherify.train.recipe import RECIPES, Recipe, resolved

__all__ = ["RECIPES", "Evaluation", "Fitted", "Loaders", "Recipe", "evaluate", "fit", "loaders_for", "resolved"]
