"""Supervised fine-tuning and preference losses: objectives.py has the formulas, method.py the methods that use them."""

from rec_dist.methods.preference.objectives import dmpo, dpo, dynamicpo, mppo, preference_objective, recpo, sdpo, sft

__all__ = ["dmpo", "dpo", "dynamicpo", "mppo", "preference_objective", "recpo", "sdpo", "sft"]
