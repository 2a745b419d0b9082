"""The section `profile`: how `rec-dist profile` measures."""

from pydantic import Field

from rec_dist.config.section import Section


class ProfileConfig(Section):
    """How `rec-dist profile` measures. Nothing here changes a run."""

    warmup_steps: int = Field(
        3, ge=1, lt=1 << 30, description="Steps before the measured ones, for compilation, caches and the allocator."
    )
    steps: int = Field(10, ge=1, lt=1 << 30, description="Measured steps, with real data and again with random tokens.")
    trace_ranks: list[int] = Field(
        default_factory=lambda: [0], description="Ranks that write a Chrome trace of one further step: trace-rank-N.json."
    )
    memory_snapshot: bool = Field(
        False,
        description="Also write the CUDA allocator's history of that step, memory-rank-N.pickle, for pytorch.org/memory_viz.",
    )
    output_dir: str | None = Field(None, description="Folder for the results. None: <run_dir>-profile.")
