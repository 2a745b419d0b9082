"""Supervised fine-tuning and preference losses: objectives.py has the formulas, method.py the methods that use them."""

from rec_dist.methods.preference.objectives import dmpo, dpo, preference_objective, sdpo, sft

__all__ = ["dmpo", "dpo", "preference_objective", "sdpo", "sft"]
