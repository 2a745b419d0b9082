"""What every section of a configuration is."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section: unknown keys are faults, values are not coerced across kinds, nothing changes after validation."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, protected_namespaces=(), validate_default=True, allow_inf_nan=False
    )
