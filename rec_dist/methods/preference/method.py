"""SFT, DPO, DMPO, S-DPO, MPPO and DynamicPO as methods. Their objectives live apart, since they need no configuration."""

from collections.abc import Callable

from rec_dist.config.schema import RunConfig
from rec_dist.methods.language_model.method import LanguageModelMethod
from rec_dist.methods.language_model.objective import Objective
from rec_dist.methods.preference.objectives import dmpo, dpo, dynamicpo, mppo, sdpo, sft


class PreferenceMethod(LanguageModelMethod):
    """objective: (beta, number of rejected completions) -> Objective. max_rejected: as in LanguageModelMethod."""

    def __init__(self, name: str, objective: Callable[[float, int], Objective], *, max_rejected: int | None = None) -> None:
        self.name, self.max_rejected = name, max_rejected
        self._objective = objective

    def objective(self, config: RunConfig, num_rejected: int) -> Objective:
        """The objective with task.beta."""
        return self._objective(config.task.beta, num_rejected)


SFT = PreferenceMethod("sft", lambda beta, num: sft(), max_rejected=0)
DPO = PreferenceMethod("dpo", lambda beta, num: dpo(beta=beta, num_negatives=num), max_rejected=1)
DMPO = PreferenceMethod("dmpo", lambda beta, num: dmpo(beta=beta, num_negatives=num))
MPPO = PreferenceMethod("mppo", lambda beta, num: mppo(beta=beta, num_negatives=num))
DYNAMICPO = PreferenceMethod("dynamicpo", lambda beta, num: dynamicpo(beta=beta, num_negatives=num))
SDPO = PreferenceMethod("sdpo", lambda beta, num: sdpo(beta=beta, num_negatives=num))
