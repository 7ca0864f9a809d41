"""Defines the manifest of a probe: its name, model, inputs, output, calibrations and golden vectors.

The manifest is stored inside the probe file, as JSON under ``METADATA_KEY`` of the ONNX ``metadata_props``.
``docs/reference/probe-manifest.schema.json`` is generated from these classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator

from probescore.reductions import Reduction, ReductionKind
from probescore.types import Hook, OutputPer, PromptShape, ScoreUnit, Tap
from probescore_server.probes.format.complaints import first_complaint

METADATA_KEY = "probescore.manifest"

Sha256 = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]

# Every number of a manifest has one of these types, which allow what the number's meaning allows, and no value (NaN, infinity) with which
# every comparison would pass. Scores travel as float32 and are compared in float64, where sums of their squares stay finite.
MAX_FLOAT32 = 3.4028234663852886e38
MAX_INT32 = 2**31 - 1
MAX_COUNT = 2**53 - 1

MAX_NEIGHBOUR_LABELS = 256
"""Limits for how many labels of a probe, counted from the first, a manifest also stores the scores that come out if activations are read at
a wrong decoder block or token.
"""

Real = Annotated[float, Field(allow_inf_nan=False, ge=-MAX_FLOAT32, le=MAX_FLOAT32)]
Rate = Annotated[float, Field(allow_inf_nan=False, ge=0, le=1)]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT32)]
Size = Annotated[int, Field(gt=0, le=MAX_INT32)]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]


def _no_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number")
    return value


SchemaVersion = Annotated[Literal[1], BeforeValidator(_no_boolean)]  # Python's True equals 1, and a literal is found by equality
TokenShift = Annotated[Literal[-1, 0, 1], BeforeValidator(_no_boolean)]


class _ManifestPart(BaseModel):
    """Base class of every part of a probe's manifest.

    A part made in Python from an invalid value raises ``ValueError`` with a message of this form: ``Context: kind: found "causl", expected
    …``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def __init__(self, *unnamed: object, **fields: Any) -> None:  # noqa: ANN401  each of its own type
        if unnamed:
            raise TypeError(
                f"{type(self).__name__}: {unnamed[0]!r:.80} without a name; give fields by name: {', '.join(type(self).model_fields)}"
            )
        fields = {
            name: value.tolist() if hasattr(value, "tolist") else value for name, value in fields.items()
        }  # numpy's numbers and arrays
        try:
            super().__init__(**fields)
        except ValidationError as error:
            field, found, expected = first_complaint(error, fields)
            raise ValueError(f"{type(self).__name__}: {field}: found {found}, expected {expected}") from None

    # A part inside another is validated with it, so that its complaint names the whole path.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


def _canonical_reduction(written: str) -> str:
    try:
        reduction = Reduction.parse(written)
    except ValueError as error:
        raise ValueError(f"a reduction ({error})") from None
    largest = MAX_INT32 if reduction.kind in (ReductionKind.TOPK_MEAN, ReductionKind.WINDOW_MAX_MEAN) else MAX_FLOAT32
    if reduction.parameter is not None and abs(reduction.parameter) > largest:
        raise ValueError(f"a reduction whose parameter is at most {largest:g}")
    return str(reduction)


class ModelReference(_ManifestPart):
    """Reference to the language model that a probe was made for."""

    id: str = Field(min_length=1, max_length=256, description="The model's name, for people; it is not a path.")
    revision: str = Field("", max_length=128, description="The model's revision on the hub, for people.")
    fingerprint: Sha256 = Field(
        description="The model must have this digest of its tensors and of the config's settings that change activations."
    )
    hidden_size: Size
    num_hidden_layers: Size = Field(description="How many decoder blocks the whole model has.")


class TapInput(_ManifestPart):
    """One input of a probe's graph: the activations at a tap of the language model, float32, (tokens, hidden_size).

    A tap is a hook, a point in a decoder block, and the block's index. The input's name is ``hook.layer``, or ``final_norm``.
    """

    hook: Hook = Field(strict=False)
    layer: Annotated[int, Field(ge=0, lt=MAX_INT32)] | None = Field(
        None, description="The 0-based index of the decoder block; null for final_norm."
    )

    @model_validator(mode="after")
    def _layer_fits_hook(self) -> TapInput:
        if (self.layer is not None) != self.hook.has_layer:
            raise ValueError(f"{'a layer' if self.hook.has_layer else 'no layer'} for hook {self.hook}")
        return self

    @classmethod
    def parse(cls, written: str | Tap) -> TapInput:
        """Reads a tap, a point in a language model, from text such as ``"resid_post.6"`` or ``"final_norm"``.

        Raises:
            ValueError: there is no such hook, or its layer is missing or not a number.
        """
        hook, dot, layer = str(written).partition(".")
        if dot and not (layer.isascii() and layer.isdecimal()):
            raise ValueError(f"tap {str(written)!r}: the layer {layer!r} is not a number")
        return cls(hook=hook, layer=int(layer) if dot else None)

    @property
    def tap(self) -> Tap:
        """Returns the tap as a ``probescore.types.Tap``, the type that the client package uses."""
        return Tap(self.hook.value, self.layer)

    def moved(self, blocks: int, num_hidden_layers: int) -> TapInput | None:
        """Returns the tap (point in the model) that lies ``blocks`` decoder blocks later, or ``None`` if the model has no such tap.

        ``blocks`` may be negative. A moved tap of the residual stream may have another hook. The tap after the last block's ``resid_post``
        is ``final_norm``.
        """
        if self.hook in (Hook.ATTN_OUT, Hook.MLP_OUT):
            layer = (self.layer or 0) + blocks
            return TapInput(hook=self.hook, layer=layer) if 0 <= layer < num_hidden_layers else None
        # the residual stream: 0 enters the first block, num_hidden_layers leaves the last one
        place = num_hidden_layers + 1 if self.layer is None else self.layer + (self.hook is Hook.RESID_POST)
        place += blocks
        if place == num_hidden_layers + 1:
            return TapInput(hook=Hook.FINAL_NORM)
        if not 0 <= place <= num_hidden_layers:
            return None
        before = place == 0 or (self.hook is Hook.RESID_PRE and place < num_hidden_layers)
        return TapInput(hook=Hook.RESID_PRE, layer=place) if before else TapInput(hook=Hook.RESID_POST, layer=place - 1)


class Context(_ManifestPart):
    """Part of a probe's manifest that states on which tokens a score depends besides the token that is scored."""

    kind: Literal["pointwise", "causal", "rollout"] = Field(
        "pointwise",
        description="pointwise: a score depends on its own token only; causal: also on earlier tokens; rollout: the graph pools all tokens "
        "into one score.",
    )
    window: Size | None = Field(
        None, description="How many tokens a score depends on, its own included, counted back from it; null = all; for causal only."
    )
    sees_prompt: bool = Field(False, description="Whether the graph is given the prompt's tokens too; for causal and rollout only.")


class Output(_ManifestPart):
    """Declaration of the output ``scores`` of a probe's graph: float32, (tokens, labels) or (rollouts, labels)."""

    unit: ScoreUnit = Field(strict=False)
    per: OutputPer = Field(OutputPer.TOKEN, strict=False)
    labels: tuple[str, ...] = Field(min_length=1, strict=False)

    @field_validator("labels")
    @classmethod
    def _labels_are_unique(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(labels)) != len(labels):
            raise ValueError("labels that differ")
        return labels


class FollowUp(_ManifestPart):
    """Token ids that the server appends to every finished completion for one probe.

    The probe reads and scores these tokens instead of the completion's own.
    """

    token_ids: tuple[TokenId, ...] = Field(min_length=1, strict=False)
    text: str = Field("", description="The same tokens as text, for people.")


class CalibrationConditions(_ManifestPart):
    """Part of a probe's manifest that describes the negative rollouts on which a threshold was found. The threshold is not known to hold
    for other rollouts.
    """

    groups: Annotated[int, Field(gt=0, le=MAX_COUNT)] = Field(
        description="Of the negatives. The 95% interval is then that of as many fresh rollouts in as many other groups."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(description="Of the model that scored them.")
    shortest_prompt: Count = Field(description="In tokens.")
    longest_prompt: Count = Field(description="In tokens.")
    shortest_completion: Count = Field(description="In tokens that count under the mask.")
    longest_completion: Count = Field(description="In tokens that count under the mask.")
    prompt_forms: tuple[Literal["ids", "text", "text with special tokens", "chat"], ...] = Field(
        min_length=1, strict=False, description="How prompts were given, each form once."
    )
    prompt_shapes: tuple[Annotated[PromptShape, Field(strict=False)], ...] = Field(
        (),
        strict=False,
        description="What the ids of prompts showed, each shape once: empty; template, which ends with generation_prompt_ids; or text; "
        "with bos before it if the rollout starts with BOS. Empty where nobody wrote it down.",
    )
    generation_prompt_ids: tuple[TokenId, ...] = Field(
        (), strict=False, max_length=1024, description="The model's chat template ends a prompt with these ids; empty without a template."
    )
    dataset_sha256: Sha256 | None = Field(None, description="Digest of the file that held the negatives.")


class CalibrationRecord(_ManifestPart):
    """Part of a probe's manifest that states a threshold on the probe's scores, the false-positive rate at the threshold, and the data on
    which both were measured.
    """

    threshold: Real = Field(description="A rollout whose reduced score, in the unit of reduce_on, is at or above this number is flagged.")
    false_positive_rate: Rate
    false_positive_rate_low: Rate = Field(description="The lower end of the rate's 95% interval.")
    false_positive_rate_high: Rate = Field(description="The upper end of the rate's 95% interval.")
    negatives: Annotated[int, Field(gt=0, le=MAX_COUNT)] = Field(description="The threshold was found on so many negative rollouts.")
    dataset: str
    reduction: str | None = Field(None, description="The reduction that the threshold holds for; null for a probe that pools by itself.")
    label: str = ""
    conditions: CalibrationConditions | None = Field(None, description="What the negatives were like; null where nobody wrote it down.")

    @field_validator("reduction")
    @classmethod
    def _reduction_is_known(cls, reduction: str | None) -> str | None:
        return None if reduction is None else _canonical_reduction(reduction)


class Evaluation(_ManifestPart):
    """Part of a probe's manifest that states one measured quality of the probe, such as its AUROC on a dataset."""

    metric: str
    value: Real
    low: Real | None = Field(None, description="The lower end of the value's 95% interval.")
    high: Real | None = Field(None, description="The upper end of the value's 95% interval.")
    dataset: str
    dataset_sha256: Sha256 | None = None
    positives: Count | None = None
    negatives: Count | None = None


class Training(_ManifestPart):
    """Part of a probe's manifest that states the method and the data with which the probe was trained."""

    method: str = ""
    dataset: str = ""
    dataset_sha256: Sha256 | None = None
    notes: str = ""


class GoldenCase(_ManifestPart):
    """One golden rollout: the token ids of a rollout with the scores that the code of the probe's author gave for it, in the unit that the
    manifest states.
    """

    prompt_ids: tuple[TokenId, ...] = Field(strict=False)
    completion_ids: tuple[TokenId, ...] = Field(min_length=1, strict=False)
    scores: tuple[tuple[Real, ...], ...] = Field(
        min_length=1, strict=False, description="The scores, (completion tokens, labels), or (1, labels) for a probe that pools by itself."
    )


class Tolerance(_ManifestPart):
    """Largest allowed differences between the golden scores in a probe file (those of the author's code) and the scores that a server
    computes, one for each dtype of the language model.

    The unit is the standard deviation of the golden scores, computed for each label separately.
    """

    # A tolerance is below 1 in any case: scores that are off without bound may become the spread by which they are measured.
    float32: float = Field(1e-4, allow_inf_nan=False, gt=0, le=0.1)
    bfloat16: float = Field(0.25, allow_inf_nan=False, gt=0, le=0.5)
    float16: float = Field(0.05, allow_inf_nan=False, gt=0, le=0.5)


class _NeighbouringPlace(_ManifestPart):
    """Base class of a neighbouring place, at which a server could read activations by mistake.

    A neighbouring place is one decoder block or one token beside the place where the probe reads activations.
    """

    inputs: tuple[TapInput, ...] = Field(min_length=1, strict=False, description="The taps that were read in place of the manifest's.")
    tokens: TokenShift = Field(0, description="How many tokens later the taps were read; beyond an end of the rollout, at that end.")

    @property
    def place(self) -> Place:
        """Returns a place where activations may be read, as a pair of its taps (points in the model) and its shift in tokens. The pair can
        be compared with those of ``neighbouring_places``.
        """
        return self.inputs, self.tokens

    def __str__(self) -> str:
        taps = ", ".join(str(entry.tap) for entry in self.inputs)
        return taps if self.tokens == 0 else f"{taps} one token {'later' if self.tokens > 0 else 'earlier'}"


class Neighbour(_NeighbouringPlace):
    """Part of a probe's manifest that states how the golden scores change if the code of the probe's author reads activations at a
    neighbouring place.

    A neighbouring place is one decoder block or one token beside the place where the probe reads activations. A server that gives the
    changed scores reads the wrong activations.
    """

    differences: tuple[tuple[tuple[Real, ...], ...], ...] = Field(
        strict=False,
        description="For each golden case, a row for each of its scores: what must be added to them, for the first 256 labels.",
    )

    @property
    def difference_rows(self) -> NDArray[np.float64]:
        """Returns the changes of all golden scores (those of the author's code) if activations are read at the neighbouring place (one
        decoder block or one token beside the right one), ``(rows, labels)`` float64.
        """
        return np.array([row for case in self.differences for row in case], np.float64)


class LeftOut(_NeighbouringPlace):
    """Part of a probe's manifest that names a neighbouring place for which the manifest has no scores, and the reason.

    A neighbouring place is one decoder block or one token beside the place where the probe reads activations.
    """

    reason: Literal["no_such_tap", "not_finite"] = Field(
        description="no_such_tap: the model has no such tap; not_finite: the author's code has no finite scores there."
    )


Place = tuple[tuple[TapInput, ...], TokenShift]
"""Type of a place where a probe reads activations: its taps (points in the model), and how many tokens after the scored token it reads; 0
is right.
"""


def neighbouring_places(inputs: Sequence[TapInput], num_hidden_layers: int) -> list[Place]:
    """Returns the places one decoder block or one token beside the place where a probe reads activations.

    In some of the places, the taps (points in the model) are moved one block earlier or later, all taps together or one tap alone, if the
    model has the moved taps. In the other places, the taps stay, and the tokens are moved one earlier or later.
    """
    stated = tuple(inputs)
    places: dict[Place, None] = {}
    for blocks in (-1, 1):
        moved = [entry.moved(blocks, num_hidden_layers) or entry for entry in stated]
        alone = [(*stated[:index], entry, *stated[index + 1 :]) for index, entry in enumerate(moved)]
        places |= dict.fromkeys((taps, 0) for taps in (tuple(moved), *alone) if taps != stated)
    return [*places, (stated, -1), (stated, 1)]


class Golden(_ManifestPart):
    """Golden vectors of a probe: rollouts with the scores that the code of the probe's author, not probescore, gave for them.

    Every worker process recomputes the scores before it serves the probe.
    """

    cases: tuple[GoldenCase, ...] = Field(min_length=1, strict=False)
    tolerance: Tolerance = Tolerance()
    neighbours: tuple[Neighbour, ...] = Field(
        (),
        strict=False,
        description="The scores one block or one token off; without them the probe is served only where its tolerance is at most 0.001.",
    )
    left_out: tuple[LeftOut, ...] = Field((), strict=False, description="The places one block or one token off that neighbours lacks.")

    @property
    def score_rows(self) -> NDArray[np.float64]:
        """Returns the golden scores (those of the author's code) of all cases as one float64 array, ``(rows, labels)``.

        The standard deviation of each label's scores is the unit of ``tolerance``.
        """
        return np.array([row for case in self.cases for row in case.scores], np.float64)


class AdapterReference(_ManifestPart):
    """Part of a probe's manifest that states the LoRA adapter which the probe brings, and which lies in a file beside the probe file.

    The probe reads the activations of the frozen model with this adapter.
    """

    sha256: Sha256 = Field(description="Digest of the file with the adapter's tensors, adapter_model.safetensors as PEFT writes it.")
    settings: dict[str, JsonValue] = Field(
        description="The settings of PEFT's adapter_config.json that change what the adapter computes; those that are off may be left out."
    )


class Manifest(_ManifestPart):
    """Complete description of a probe: its name and version, its language model, its inputs and output, and its golden vectors.

    Golden vectors are rollouts with scores that a server must reproduce before it serves the probe.
    """

    schema_version: SchemaVersion = 1
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    version: str = Field(
        pattern=r"^[0-9A-Za-z][0-9A-Za-z._+-]{0,31}$", description="A version is immutable: same name and version, same bytes."
    )
    description: str = ""
    author: str = ""
    license: str = ""
    model: ModelReference
    tokenizer_fingerprint: Sha256
    expects_bos: bool | None = Field(None, description="true: a prompt must start with BOS; false: it must not; null: not checked.")
    inputs: tuple[TapInput, ...] = Field(min_length=1, strict=False, description="The taps, in the order of the graph's inputs.")
    cu_seqlens: bool = Field(False, description="The graph takes `cu_seqlens`, int64, (sequences + 1): where each sequence starts.")
    positions: bool = Field(False, description="The graph takes `positions`, int64, (tokens): each token's position in its rollout.")
    context: Context = Context()
    output: Output
    reduce_on: ScoreUnit = Field(
        strict=False,
        description="The unit of everything the server sends for this probe. Where it is `probability` and the graph gives logits, the "
        "sigmoid is applied to each score before the reduction.",
    )
    reduction: str | None = Field(None, description="The default reduction; null for a probe that pools by itself.")
    exclude_special_tokens: bool = Field(False, description="Special tokens are left out of reductions and pooling.")
    special_token_ids: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] | None = Field(
        None,
        strict=False,
        max_length=100_000,
        description="The ids that exclude_special_tokens leaves out, in the order of their numbers; null = BOS, EOS and UNK, which are the "
        "special tokens that tokenizer_fingerprint covers.",
    )
    follow_up: FollowUp | None = None
    adapter: AdapterReference | None = Field(None, description="The adapter that the probe brings; null for a probe of the model as it is.")
    calibrations: tuple[CalibrationRecord, ...] = Field((), strict=False)
    evaluations: tuple[Evaluation, ...] = Field((), strict=False)
    training: Training = Training()
    golden: Golden
    graph_sha256: Sha256
    manifest_sha256: Sha256

    @field_validator("reduction")
    @classmethod
    def _reduction_is_known(cls, reduction: str | None) -> str | None:
        return None if reduction is None else _canonical_reduction(reduction)

    # Each message is the field at fault and what is expected of it, so that a refusal can name both.
    @model_validator(mode="after")
    def _parts_fit_together(self) -> Manifest:
        pools = self.output.per is OutputPer.ROLLOUT
        if pools != (self.context.kind == "rollout"):
            raise ValueError("output.per: 'rollout' if context.kind is 'rollout', else 'token'")
        if pools == (self.reduction is not None):
            raise ValueError("reduction: one for a probe that scores tokens, null for one that pools by itself")
        if self.context.kind == "pointwise" and (self.context.sees_prompt or self.cu_seqlens):
            raise ValueError("context: no cu_seqlens and no sees_prompt for a pointwise probe")
        if self.context.kind != "pointwise" and not self.cu_seqlens:
            raise ValueError("cu_seqlens: true unless context.kind is 'pointwise'")
        if self.context.window is not None and self.context.kind != "causal":
            raise ValueError("context.window: null unless context.kind is 'causal'")
        if self.reduce_on is not self.output.unit and (self.output.unit, self.reduce_on) != (ScoreUnit.LOGIT, ScoreUnit.PROBABILITY):
            raise ValueError(f"reduce_on: what can be computed from output.unit {self.output.unit.value}")
        ids = self.special_token_ids
        if ids is not None and (not self.exclude_special_tokens or list(ids) != sorted(set(ids))):
            raise ValueError("special_token_ids: null without exclude_special_tokens, else each id once, in the order of their numbers")
        if len({entry.tap for entry in self.inputs}) != len(self.inputs):
            raise ValueError("inputs: each tap once")
        for entry in self.inputs:
            if entry.layer is not None and entry.layer >= self.model.num_hidden_layers:
                raise ValueError(f"inputs: layers below model.num_hidden_layers {self.model.num_hidden_layers}")
        for index, case in enumerate(self.golden.cases):
            rows = 1 if pools else len(self.follow_up.token_ids if self.follow_up else case.completion_ids)
            if len(case.scores) != rows or any(len(row) != len(self.output.labels) for row in case.scores):
                raise ValueError(f"golden.cases[{index}].scores: {rows} rows of {len(self.output.labels)} numbers")
            if self.output.unit is ScoreUnit.PROBABILITY and any(not -1e-6 <= score <= 1 + 1e-6 for row in case.scores for score in row):
                raise ValueError(f"golden.cases[{index}].scores: probabilities, from 0 to 1")
        self._neighbours_fit()
        return self

    def _neighbours_fit(self) -> None:
        labels = min(len(self.output.labels), MAX_NEIGHBOUR_LABELS)
        rows = [len(case.scores) for case in self.golden.cases]
        taken: set[Place] = set()
        for field, elsewhere in (("neighbours", self.golden.neighbours), ("left_out", self.golden.left_out)):
            for index, entry in enumerate(elsewhere):
                if len(entry.inputs) != len(self.inputs) or entry.place in taken:
                    raise ValueError(f"golden.{field}[{index}].inputs: as many taps as the manifest's inputs, each place once")
                taken.add(entry.place)
        for index, neighbour in enumerate(self.golden.neighbours):
            differences = neighbour.differences
            if list(map(len, differences)) != rows or any(len(row) != labels for case in differences for row in case):
                raise ValueError(f"golden.neighbours[{index}].differences: a row of {labels} numbers for each golden score")

    @property
    def key(self) -> str:
        """Returns the probe's name and version as ``name@version``."""
        return f"{self.name}@{self.version}"

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Returns the taps (points in the language model) that the probe reads, in the order of the inputs of its graph."""
        return tuple(entry.tap for entry in self.inputs)


def manifest_digest(manifest: Manifest) -> str:
    """Computes ``sha256:…`` over a manifest's canonical JSON without its two digests, the manifest's own and the graph's.

    The graph's digest is left out so that it can be checked independently.
    """
    content = manifest.model_dump(mode="json", exclude={"graph_sha256", "manifest_sha256"})
    for field in ("neighbours", "left_out"):
        if not content["golden"][field]:
            del content["golden"][field]  # so that files that were written without keep their digest
    if manifest.special_token_ids is None:
        del content["special_token_ids"]  # so that files that were written without keep their digest
    if manifest.adapter is None:
        del content["adapter"]  # so that files that were written without keep their digest
    for calibration in content["calibrations"]:
        if calibration["conditions"] is None:
            del calibration["conditions"]  # so that files that were written without keep their digest
            continue
        for field in ("prompt_shapes", "generation_prompt_ids"):
            if not calibration["conditions"][field]:
                del calibration["conditions"][field]  # so that files that were written without keep their digest
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def manifest_schema() -> str:
    """Returns the JSON Schema of a probe's manifest as it is published: JSON text with a final newline.

    The schema states shapes and ranges; ``read_probe_file`` also checks that the parts of a manifest fit together.
    """
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Manifest.model_json_schema()}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
