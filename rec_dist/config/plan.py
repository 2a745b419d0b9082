"""The section `plan`: what `rec-dist plan` computes with."""

from pydantic import Field

from rec_dist.config.section import Section


class PlanConfig(Section):
    """What `rec-dist plan` computes with. Nothing here changes a run."""

    cluster: str | None = Field(None, description="Cluster file, or the name of a shipped one, such as 8xh100. `plan` needs it.")
    model: str | None = Field(
        None, description="Folder with a config.json, or a shipped name, such as llama3-8b. None: model.path."
    )
    prompt_tokens: float | None = Field(
        None, ge=1, description="Mean tokens of a prompt. None: 16 + prompt.num_virtual + items shown * plan.completion_tokens."
    )
    completion_tokens: float = Field(10.0, gt=1, description="Mean tokens of a title with the text around it.")
    overlap: float = Field(0.5, ge=0, le=1, description="Share of ZeRO-3's gathers that overlaps with compute. An assumption.")
    margin: float = Field(0.08, ge=0, lt=1, description="Share added to torch's memory for fragmentation. An assumption.")
