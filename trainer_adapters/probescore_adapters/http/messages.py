"""Defines the JSON objects of the HTTP gateway's requests and responses; the OpenAPI page is generated from them.

Requests of trainers may have keys that the gateway does not read. Requests written by people may not have unknown keys, so that a mistyped
key is noticed.
"""

from __future__ import annotations

from typing import Annotated, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, model_validator

from probescore import Chat
from probescore_adapters.rollouts import Prompt, Rollout

MAX_ROLLOUTS = 4096
"""Maximum number of rollouts in one request."""

# each list stops at its first fault: millions of them would be described one by one
TokenIds = Annotated[list[Annotated[StrictInt, Field(ge=0, le=2**31 - 1)]], Field(fail_fast=True)]
MaskBits = Annotated[list[Annotated[StrictInt, Field(ge=0, le=1)]], Field(fail_fast=True)]
Texts = Annotated[list[StrictStr], Field(fail_fast=True, min_length=1, max_length=MAX_ROLLOUTS)]


class StrictModel(BaseModel):
    """Base class of JSON objects that refuse unknown keys."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _stop_at_the_first_other_key(cls, given: object) -> object:
        if isinstance(given, dict):
            for key in given:
                if key not in cls.model_fields:
                    raise ValueError(f"{key[:100]!r}: there is no such field")
        return given


class Message(StrictModel):
    """One message of a chat."""

    role: StrictStr
    content: StrictStr


Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1)]


class OpenRlhfRequest(BaseModel):
    """JSON object that the trainer OpenRLHF posts to ``--reward.remote_url``; it sends one sample at a time. ``labels`` are not read."""

    query: Annotated[Texts, Field(description="Prompt and response, decoded with special tokens.")]
    prompts: Annotated[Texts, Field(description="One for each query, which must begin with it.")]

    @model_validator(mode="after")
    def _one_prompt_a_query(self) -> OpenRlhfRequest:
        if len(self.prompts) != len(self.query):
            raise ValueError(f"{len(self.query)} queries and {len(self.prompts)} prompts")
        return self

    def rollouts(self) -> list[Rollout]:
        """Returns the samples in a request of the trainer OpenRLHF as rollouts of text. A query that does not begin with its prompt gets no
        score, since the place where the response begins would be a guess.
        """
        return [Rollout.split(prompt, query) for prompt, query in zip(self.prompts, self.query)]  # noqa: B905 - Python 3.10


class OpenRlhfAnswer(BaseModel):
    """JSON object that the trainer OpenRLHF reads as the response, with a reward for each query."""

    rewards: list[float]
    scores: list[float]
    extra_logs: Annotated[
        dict[str, list[float]],
        Field(description="Always the same keys, and always numbers, or OpenRLHF breaks: NaN, as Python writes it, for nothing to say."),
    ]


class SlimeRequest(BaseModel):
    """JSON object that the trainer slime posts to ``--rm-url``. ``label`` is not read."""

    prompt: Union[StrictStr, Messages]
    response: StrictStr

    def rollout(self) -> Rollout:
        """Returns the sample in a request of the trainer slime as a rollout of text."""
        return Rollout(_prompt(self.prompt), self.response)


class RolloutToScore(StrictModel):
    """A rollout to score: one prompt and one completion of the prompt."""

    prompt: Annotated[Union[StrictStr, TokenIds, Messages], Field(description="Token ids, taken verbatim; text; or a chat.")]
    completion: Annotated[
        Union[StrictStr, TokenIds], Field(description="Token ids as they were sampled, the end-of-sequence token included; or text.")
    ]
    mask: Annotated[MaskBits | None, Field(description="For each token whether it counts; by default all do.")] = None

    @model_validator(mode="after")
    def _one_bit_a_token(self) -> RolloutToScore:
        if self.mask is not None and not isinstance(self.completion, str) and len(self.mask) != len(self.completion):
            raise ValueError(f"mask has {len(self.mask)} entries for {len(self.completion)} tokens")
        return self

    def rollout(self) -> Rollout:
        """Returns the prompt and completion as the ``Rollout`` that a ``ProbeScorer`` takes."""
        return Rollout(_prompt(self.prompt), self.completion, self.mask)


class ScoreRequest(StrictModel):
    """Rollouts to score with the signals (rules from probe scores to rewards) that the HTTP gateway is configured with. The prompt of
    rollouts with the same prompt is computed once.
    """

    rollouts: Annotated[list[RolloutToScore], Field(fail_fast=True, min_length=1, max_length=MAX_ROLLOUTS)]
    step: Annotated[StrictInt | None, Field(ge=0, le=2**31 - 1, description="Of the training, for the server's logs.")] = None


class ScoreAnswer(BaseModel):
    """Probe scores and rewards of the rollouts of a request, in the order of the request."""

    rewards: Annotated[list[float], Field(description="What rewards and penalties add up to.")]
    values: Annotated[dict[str, list[float | None]], Field(description="What the probe said, for each signal; null where unscorable.")]
    flagged: Annotated[dict[str, list[bool]], Field(description="At or above the signal's threshold.")]
    unscorable: Annotated[list[bool], Field(description="Not scored by some signal: ``rewards`` has what the policies say instead.")]
    metrics: Annotated[dict[str, float | None], Field(description="Of the batch; null where there is nothing to say.")]


class Health(BaseModel):
    """Response that says that the HTTP gateway is running; this says nothing about the probescore server behind the gateway."""

    status: Literal["ok"] = "ok"


class FieldProblem(BaseModel):
    """One fault in the body of a request."""

    field: Annotated[str, Field(examples=["rollouts.0.mask"])]
    problem: str


class ProblemDetails(BaseModel):
    """Reason why the HTTP gateway returns no scores, as problem details of RFC 9457."""

    title: str
    status: int
    detail: str = ""
    errors: list[FieldProblem] = []


def _prompt(given: Union[str, list[int], list[Message]]) -> Prompt:
    if isinstance(given, str) or not given or isinstance(given[0], int):
        return given  # type: ignore[return-value]
    return Chat.of([message.model_dump() for message in given])
