"""Limits the number of parts of a request, which are counted on the request's protobuf message before Python objects are made.

The objects cost far more than the message: a span (token range) takes two bytes of a message, but a hundred bytes as a Python object.
"""

from __future__ import annotations

from collections.abc import Sequence

from probescore.v1 import scoring_pb2
from probescore_server.errors import InvalidRequest, LimitExceeded
from probescore_server.settings import ServerSettings


def check_counts(request: scoring_pb2.ScoreRequest, limits: ServerSettings, loaded_probes: int) -> None:
    """Refuses a request message with more completions, follow-ups (texts that continue a completion), spans (token ranges), reductions or
    names of probes or readings than the limits allow.

    Args:
        request: the message as received.
        limits: the server's settings.
        loaded_probes: the number of loaded probes; a request names each at most once.

    Raises:
        LimitExceeded: there are too many parts of one kind; the error names ``groups``, ``reductions``, or a completion's ``spans`` or
            ``follow_ups``.
        InvalidRequest: there are too many names; the error names ``probes``, ``token_scores.probes`` or ``readings[i]``.
    """
    for field, names in (("probes", request.probes), ("token_scores.probes", request.token_scores.probes)):
        # Each probe has two names, with its version and without. A wrong one among fewer names is found where they are looked up.
        if len(names) > 2 * loaded_probes:
            raise InvalidRequest(field, f"{len(names)} names, of {loaded_probes} loaded probes; name each once")
    most = 1 + limits.max_readings  # The frozen one has a name, too.
    if (count := len(request.readings)) > most:
        raise InvalidRequest(
            f"readings[{most}]", f"the last but {count - most} of {count} names, of at most {most} readings; name each once"
        )
    if (count := len(request.reductions)) > limits.max_reductions:
        raise LimitExceeded("reductions", count, "reductions", "max_reductions", limits.max_reductions, "ask in several requests")
    check_rollout_counts(request.groups, limits)


def check_rollout_counts(groups: Sequence[scoring_pb2.RolloutGroup], limits: ServerSettings) -> None:
    """Refuses the groups of a request message with more completions, follow-ups (token ids appended to a completion) or spans (token
    ranges) than the limits allow.

    Raises:
        LimitExceeded: there are too many of one kind; the error names ``groups``, or a completion's ``spans`` or ``follow_ups``.
    """
    rollouts = len(groups)  # Each group has at least one completion, or is refused later.
    _check_rollouts(rollouts, limits)
    rollouts = sum(len(group.completions) for group in groups)
    _check_rollouts(rollouts, limits)
    for index, group in enumerate(groups):
        for position, completion in enumerate(group.completions):
            if completion.spans or completion.follow_ups:
                field = f"groups[{index}].completions[{position}]"
                if (follow_ups := _check_tree(completion, field, limits)) > limits.max_follow_ups:
                    remedy = "send the completion several times, each with some of them"
                    field = f"{field}.follow_ups"
                    raise LimitExceeded(field, follow_ups, "follow-ups", "max_follow_ups", limits.max_follow_ups, remedy)
                _check_rollouts(rollouts := rollouts + follow_ups, limits)


def _check_rollouts(count: int, limits: ServerSettings) -> None:
    most = limits.max_request_rollouts
    if count > most:
        raise LimitExceeded("groups", count, "completions and follow-ups", "max_request_rollouts", most, "send them in several requests")


def _check_tree(completion: scoring_pb2.Completion, field: str, limits: ServerSettings) -> int:
    """Checks the number of spans (token ranges) of a completion, and of all follow-ups that continue the completion at any depth. It
    returns the number of these follow-ups.
    """
    if (count := len(completion.spans)) > limits.max_spans:
        remedy = "send the completion several times, each with some of them"
        raise LimitExceeded(f"{field}.spans", count, "spans", "max_spans", limits.max_spans, remedy)
    count = len(completion.follow_ups)
    if count > limits.max_follow_ups:
        return count  # These are too many already.
    return count + sum(
        _check_tree(follow_up, f"{field}.follow_ups[{index}]", limits) for index, follow_up in enumerate(completion.follow_ups)
    )
