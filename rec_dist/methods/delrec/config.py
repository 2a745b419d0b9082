"""The section task.delrec: stage 1 of DELRec, which distils a sequential recommender into soft prompts."""

from typing import Literal

from pydantic import Field

from rec_dist.config.section import Section

RANDOM_TEACHER = "random"


class DelrecConfig(Section):
    """Whose ranking is distilled, how much of it a prompt shows, and in which words."""

    teacher: str | None = Field(
        None,
        description="Run directory of a recommender trained with task.sequential.top_h, or `random` for lists drawn by hash.",
        json_schema_extra={"path": True, "names": [RANDOM_TEACHER]},
    )
    top_h: int = Field(10, ge=2, description="h, how many items of the teacher's list to use; at most as many as it saved.")
    objectives: Literal["both", "temporal", "pattern"] = Field(
        "both", description="temporal: only Temporal Analysis; pattern: only Recommendation Pattern Simulating."
    )
    after_header: str = Field("\nWatched next:", description="temporal: stands before the later item.")
    before_header: str = Field("\nThe movie right before it:", description="temporal: stands before the earlier item.")
    list_header: str = Field("\nA recommender also likes:", description="pattern: stands before the list without its first.")
    first_header: str = Field("\nWhat it likes most:", description="pattern: stands before the list's first item.")
