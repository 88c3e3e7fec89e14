"""Named sets of the engine's flags: a model and a stage become one list of words. No torch here."""

from megatron_mlr1.recipes.plan import Plan, expand
from megatron_mlr1.recipes.sheet import Corpus, Flag, Mixture, Sheet

__all__ = ["Corpus", "Flag", "Mixture", "Plan", "Sheet", "expand"]
