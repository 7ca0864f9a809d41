"""Converts the keyword arguments of the client's methods ``score`` and ``score_stream`` to the options of a scoring request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict, Union

from probescore.reductions import Reduction
from probescore.types import Scope
from probescore.types.readings import name_problem
from probescore.wire import MessageError, RequestOptions


class ScoreOptions(TypedDict, total=False):
    """Types of the keyword arguments of the client's methods ``score`` and ``score_stream`` (a ``TypedDict``), which determine how rollouts
    are scored. All are optional.

    Attributes:
        probes: the probes to apply. ``"name@version"`` means that version, ``"name"`` the highest version that the server has of the name;
            default: the highest version of each name.
        reductions: how per-token scores become one number per rollout, each as ``"mean"``, ``"topk_mean(8)"`` or a ``Reduction``; default:
            each probe's default reduction.
        token_scores: whether the server sends back per-token scores: ``True`` or ``"all"`` for every probe, or names of probes; default:
            ``False``.
        scope: the tokens to score; default: those of the completion.
        expected_model_fingerprint: fingerprint of a model; the RPC fails with ``MismatchError`` if the server runs another model.
        expected_tokenizer_fingerprint: fingerprint of a tokenizer, as ``tokenizer_fingerprint(tokenizer)`` computes it; the RPC fails with
            ``MismatchError`` if the server runs another tokenizer.
        return_token_ids: whether the server sends back the token ids that were scored.
        return_token_texts: whether the server sends back the scored tokens as text.
        priority: an integer from -100 to 100; among the requests of one training run, those of higher priority are scored first; default:
            0.
        run_id: name of the training run in the server's logs, at most 256 bytes.
        step: number of the training step, for the server's logs.
        readings: whose activations the probes read: ``"frozen"``, and names given to ``load_reading``; default: the frozen model's. All
            scores of one call are of the same version of a reading: if its name comes to mean another version during ``score_stream``, the
            stream ends with a ``MismatchError`` whose reason is ``READING_CHANGED``.
    """

    probes: Union[str, Sequence[str]]
    reductions: Union[str, Reduction, Sequence[Union[str, Reduction]]]
    token_scores: Union[bool, str, Sequence[str]]
    scope: Union[Scope, str]
    expected_model_fingerprint: str
    expected_tokenizer_fingerprint: str
    return_token_ids: bool
    return_token_texts: bool
    priority: int
    run_id: str
    step: Union[int, None]
    readings: Union[str, Sequence[str]]


def request_options(
    *,
    probes: str | Sequence[str] = (),
    reductions: str | Reduction | Sequence[str | Reduction] = (),
    token_scores: bool | str | Sequence[str] = False,
    scope: Scope | str = Scope.COMPLETION,
    expected_model_fingerprint: str = "",
    expected_tokenizer_fingerprint: str = "",
    return_token_ids: bool = False,
    return_token_texts: bool = False,
    priority: int = 0,
    run_id: str = "",
    step: int | None = None,
    readings: str | Sequence[str] = (),
) -> RequestOptions:
    """Converts the keyword arguments that ``ScoreOptions`` documents to the options of a request.

    Raises:
        MessageError: an unknown scope or reduction, or a name that no reading can have, or that comes twice.
    """
    try:
        scope = Scope(scope)
    except ValueError:
        raise MessageError("scope", f"{scope!r} is none of {', '.join(known.value for known in Scope)}") from None
    return RequestOptions(
        probes=(probes,) if isinstance(probes, str) else tuple(probes),
        reductions=_reductions((reductions,) if isinstance(reductions, (str, Reduction)) else reductions),
        token_scores=_token_scores(token_scores),
        scope=scope,
        expected_model_fingerprint=expected_model_fingerprint,
        expected_tokenizer_fingerprint=expected_tokenizer_fingerprint,
        return_token_ids=return_token_ids,
        return_token_texts=return_token_texts,
        priority=priority,
        run_id=run_id,
        step=step,
        readings=_readings((readings,) if isinstance(readings, str) else readings),
    )


def _reductions(written: Sequence[str | Reduction]) -> tuple[Reduction, ...]:
    reductions = []
    for index, entry in enumerate(written):
        try:
            reductions.append(Reduction.parse(entry))
        except ValueError as error:
            raise MessageError(f"reductions[{index}]", str(error)) from None
    return tuple(reductions)


def _readings(names: Sequence[str]) -> tuple[str, ...]:
    for index, name in enumerate(names):
        if problem := name_problem(name):
            raise MessageError(f"readings[{index}]", problem)
        if name in names[:index]:
            raise MessageError(f"readings[{index}]", f"{name} appears twice")
    return tuple(names)


def _token_scores(wanted: bool | str | Sequence[str]) -> Literal["all"] | tuple[str, ...]:
    if isinstance(wanted, bool):
        return "all" if wanted else ()
    if isinstance(wanted, str):
        return "all" if wanted == "all" else (wanted,)
    return tuple(wanted)
