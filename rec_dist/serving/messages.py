"""The bodies of requests and answers, from which FastAPI makes /openapi.json."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

Name = Annotated[StrictStr | StrictInt, Field(description="An id of the source, or the title of an item.")]
# At the first wrong name: an error for each of 100,000 would keep every other request waiting.
Names = Annotated[list[Name], Field(fail_fast=True)]
MOST_ITEMS = 1000  # of a list that comes back
MOST_NAMES = 100_000  # of a history or of candidates


class ProblemError(Exception):
    """What a request gets in place of an answer."""

    def __init__(self, status: int, sentence: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.headers = status, sentence, headers or {}


class Question(BaseModel):
    """Whose taste: a history, or a user of the data set."""

    model_config = ConfigDict(extra="forbid")

    history: Names | None = Field(None, max_length=MOST_NAMES, description="Items, oldest first; unknown ones are skipped.")
    user_id: Name | None = Field(None, description="A user of the data set, with the whole history, in place of `history`.")
    members: StrictBool = Field(False, description="Ensembles: also what each member adds to a score.")


class RankQuestion(Question):
    """Asks for the best items."""

    candidates: Names | None = Field(
        None, min_length=1, max_length=MOST_NAMES, description="Rank these items. Without it: the whole catalogue."
    )
    top_k: StrictInt = Field(10, ge=1, le=MOST_ITEMS, description="Items of the list.")
    exclude_seen: StrictBool = Field(True, description="Leave out items of the history.")


class ScoreQuestion(Question):
    """Asks for the score of each candidate."""

    candidates: Names = Field(min_length=1, max_length=MOST_NAMES, description="Score these items, in this order.")


class RankedItem(BaseModel):
    """An item of a list. score: what `rec-dist evaluate` scores by; null where it is not finite."""

    rank: int
    item_id: str
    title: str
    score: float | None
    members: dict[str, float | None] | None = None


class Reply(BaseModel):
    """What both answers say. fallback: the user has no known item, so scores are training counts.

    model: changes when another model is taken up.
    """

    model: str
    fallback: bool
    unknown_history: int
    unknown_candidates: int
    seconds: float


class RankReply(Reply):
    """A list, the best item first."""

    items: list[RankedItem]


class ScoreReply(Reply):
    """Scores in the order of the candidates, null for an unknown one."""

    scores: list[float | None]
    members: dict[str, list[float | None]] | None = None


class FoundItem(BaseModel):
    """An item of the catalogue."""

    item_id: str
    title: str


class FoundItems(BaseModel):
    """Items whose title or id matches."""

    items: list[FoundItem]


class Fault(BaseModel):
    """What went wrong, in one sentence."""

    error: str


def sentence(errors: list[Any]) -> str:
    """One sentence on the first of pydantic's errors."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return f"the body is no JSON: {first['ctx']['error']}"
    if first["type"] in ("model_attributes_type", "model_type"):
        return "the body must be a JSON object, sent with the header `content-type: application/json`"
    words = [
        word for word in first["loc"] if word not in ("body", "query", "str", "int") and not str(word).startswith("constrained")
    ]
    place = "".join(f"[{word}]" if isinstance(word, int) else f".{word}" for word in words).lstrip(".") or "the body"
    if first["type"] == "extra_forbidden":
        return f"{place} is no field; see /openapi.json for those that there are"
    if first["type"] in ("string_type", "int_type") and len({error["loc"][:-1] for error in errors}) < len(errors):
        return f"{place} must be an id or a title: a text or a whole number"
    return f"{place}: {first['msg'][0].lower()}{first['msg'][1:]}"
