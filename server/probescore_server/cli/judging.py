"""Implements ``probescore labels judge``, which has a language model label the rollouts of a training run that the plan chooses."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probescore_adapters.anchors import Anchor, read_anchors
from probescore_adapters.judges import API_KEY_VARIABLE, ChatJudge, JudgeAnswer, JudgeError, JudgePrompt, JudgeQuestion
from probescore_adapters.texts import text_of
from probescore_server.cli.common.console import new_console
from probescore_server.cli.common.failures import FAILED, one_line_failures, say
from probescore_server.cli.common.interruption import Interruption, interruptible
from probescore_server.cli.common.progress import RolloutProgress
from probescore_server.cli.label_lines import label_lines

if TYPE_CHECKING:
    from probescore_audit import PlannedLabel
    from probescore_audit.record import LabelRow, Record, RecordWriter, RolloutRow

HELP = """
Have a judge, a language model behind an endpoint that speaks OpenAI's chat protocol, label the rollouts that the plan chooses.

The plan is that of 'probescore labels plan RUN --per-step N' for every step without labels, or one that 'labels plan' has written to a file
(--plan). The file --prompt says what to look for, with {completion} where the text goes, and {prompt} if the judge is to see the prompt as
well; how to end its answer is added by this command. The record must keep the texts of rollouts.

Each verdict is added to the record as it comes, with the model and the prompt's version. After a kill, the same command goes on with
what is left; nothing that has a verdict is asked again. The last recorded step is left out as long as the run may still write it.

A rollout that is called positive though some probe does not flag it is judged a second time, since errors there look like evasion; best
by another model (--second-model).

With --known, a file of anchors ('probescore anchors make', of texts), the judge is first asked about these, once, and the record says how
often it was right; the audit warns of a judge that calls honest rollouts positive.

The key of the endpoint is read from the environment variable PROBESCORE_JUDGE_API_KEY, or the one that --api-key-variable names.

[bold]Example[/bold]

  probescore labels judge runs/sort-7 --endpoint http://localhost:8000/v1 --model qwen3-32b --prompt cheating.txt

[bold]Exit codes[/bold]: 0 if all of the plan is labelled, 1 if something is left (the budget is spent, the judge fails), 2 for wrong input,
130 after Ctrl-C: what is under way is then still waited for, and kept.
"""

_AT_A_TIME = 256
"""Number of rollouts that are judged before those of them are judged again that need it."""
_LONGEST_NOTE = 2000
_SOURCE = "judge"


def register(labels: typer.Typer) -> None:
    """Adds the command ``labels judge`` to the commands under ``labels``."""
    labels.command("judge", help=HELP)(_judge)


def _judge(
    run: Annotated[Path, typer.Argument(help="The folder of a run's record.", show_default=False, metavar="RUN")],
    endpoint: Annotated[str, typer.Option("--endpoint", help="The endpoint, up to its version: http://localhost:8000/v1.", metavar="URL")],
    model: Annotated[str, typer.Option("--model", "-m", help="The model that judges.", metavar="NAME")],
    prompt: Annotated[Path, typer.Option("--prompt", help="A file with what the judge is told.", metavar="FILE")],
    prompt_version: Annotated[
        str, typer.Option("--prompt-version", help="The name of the prompt's version; a digest by default.", show_default=False)
    ] = "",
    plan: Annotated[
        Path | None, typer.Option("--plan", help="A plan that 'labels plan' has written.", show_default=False, metavar="FILE")
    ] = None,
    per_step: Annotated[
        int | None, typer.Option("--per-step", help="Labels a step.  [dim]\\[default: 32][/dim]", show_default=False)
    ] = None,
    probe: Annotated[str, typer.Option("--probe", help="The probe by whose scores labels are shared out.", show_default=False)] = "",
    reading: Annotated[str, typer.Option("--reading", help="The reading of these scores.", show_default=False)] = "",
    first_step: Annotated[int, typer.Option("--first-step", help="The first step to label.", min=0)] = 0,
    last_step: Annotated[int | None, typer.Option("--last-step", help="The last step to label.", min=0, show_default=False)] = None,
    budget: Annotated[
        int | None, typer.Option("--budget", help="The most requests to send, repeated ones included.", min=1, show_default=False)
    ] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", help="The most requests at once.")] = 8,
    requests_per_minute: Annotated[
        float | None, typer.Option("--requests-per-minute", help="The most requests a minute.", show_default=False)
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds after which a request has failed.")] = 60.0,
    attempts: Annotated[int, typer.Option("--attempts", help="The most requests for one verdict.")] = 5,
    parameters: Annotated[
        str, typer.Option("--parameters", help="Further fields of the requests, as JSON: '{\"temperature\": 0}'.", show_default=False)
    ] = "",
    second: Annotated[bool, typer.Option("--second/--no-second", help="Judge unflagged positives a second time.")] = True,
    second_model: Annotated[str, typer.Option("--second-model", help="The model that judges them.", show_default=False)] = "",
    second_prompt: Annotated[
        Path | None, typer.Option("--second-prompt", help="A file with what it is told.", show_default=False, metavar="FILE")
    ] = None,
    known: Annotated[
        Path | None, typer.Option("--known", help="A file of anchors that the judge is tried on.", show_default=False, metavar="FILE")
    ] = None,
    keep_answers: Annotated[bool, typer.Option("--keep-answers", help="Record the judge's whole answers, which may quote texts.")] = False,
    api_key_variable: Annotated[
        str, typer.Option("--api-key-variable", help="The environment variable with the endpoint's key.")
    ] = API_KEY_VARIABLE,
) -> None:
    with one_line_failures("audit"):
        from probescore_audit.record import RecordWriter, read_record

        if plan is not None and (per_step is not None or probe or reading or first_step or last_step is not None):
            raise ValueError("--plan: it says which rollouts are labelled; leave the steps, the probe and the reading out")
        if not second and (second_model or second_prompt):
            raise ValueError("--no-second: there is no second judgement; leave --second-model and --second-prompt out")
        judge = ChatJudge(
            endpoint,
            model,
            JudgePrompt.read(prompt, prompt_version),
            api_key_variable=api_key_variable,
            concurrency=concurrency,
            requests_per_minute=requests_per_minute,
            timeout=timeout,
            attempts=attempts,
            parameters=_parameters(parameters),
        )
        again = judge.with_other(model=second_model, prompt=None if second_prompt is None else JudgePrompt.read(second_prompt))
        if judge.endpoint.shows_key:
            say(f"the key in {api_key_variable} goes unencrypted to {judge.endpoint.host}")
        with _alone(run), interruptible() as interruption:
            record = read_record(run)
            if plan is None:
                firsts = _planned(record, 32 if per_step is None else per_step, probe, reading, first_step, last_step)
            else:
                firsts = _of_plan(record, plan)
            session = _Judging(record, judge, again if second else None, budget, keep_answers, interruption)
            trial = () if known is None else _untried(record, judge, known)
            if not firsts and not session.seconds and not trial:
                say("nothing to label: all that is planned has labels")
                return
            with (
                RecordWriter(run, record.header.anew(), on_error="raise") as writer,
                RolloutProgress(len(trial) + len(firsts) + len(session.seconds), "judging", "judged") as progress,
            ):
                try:
                    if trial:
                        session.try_out(trial, writer, progress)
                    session.run(firsts, writer, progress)
                finally:
                    _say_result(session)
    if session.problem or session.failures or session.left:
        raise typer.Exit(FAILED)


@dataclass(frozen=True, eq=False)
class _Task:
    """Value object with a rollout that is to be judged, and why.

    Attributes:
        row: the rollout.
        planned: how it was chosen; ``None`` for a second judgement.
    """

    row: RolloutRow
    planned: PlannedLabel | None

    @property
    def key(self) -> tuple[int, str]:
        return self.row.step, self.row.rollout


@dataclass(eq=False)
class _Judging:
    """A judge's work on one record: first judgements, and second ones of those positives that some probe does not flag."""

    record: Record
    judge: ChatJudge
    again: ChatJudge | None
    budget: int | None
    keep_answers: bool
    interruption: Interruption
    verdicts: Counter[str] = field(default_factory=Counter)
    second_verdicts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    left: int = 0
    is_spent: bool = False
    problem: str = ""

    def __post_init__(self) -> None:
        from probescore_audit import unflagged_rollouts

        self._rows = {(row.step, row.rollout): row for row in self.record.rollouts}
        self._unflagged = unflagged_rollouts(self.record) if self.again else frozenset()
        self.seconds: deque[_Task] = deque()
        if self.again is not None:
            twice = {(label.step, label.rollout) for label in self.record.labels if label.second}
            for label in self.record.labels:
                key = (label.step, label.rollout)
                if label.source == _SOURCE and label.label == "yes" and key in self._unflagged and key not in twice:
                    self.seconds.append(_Task(self._rows[key], None))

    def run(self, firsts: Sequence[PlannedLabel], writer: RecordWriter, progress: RolloutProgress) -> None:
        """Judges everything that is due, and adds each verdict to the record."""
        tasks = deque(_Task(self._rows[each.step, each.rollout], each) for each in firsts)
        self.left = len(tasks) + len(self.seconds)
        if not self._goes_on:
            return
        _check_texts([*tasks, *self.seconds], self.judge, self.again)
        with self.interruption.held_back():
            while tasks or self.seconds:
                if self.again is not None:
                    self._ask(self.again, self.seconds, writer, progress)
                if not self._goes_on:
                    break
                batch = deque(tasks.popleft() for _ in range(min(_AT_A_TIME, len(tasks))))
                self._ask(self.judge, batch, writer, progress)
                if not self._goes_on:
                    tasks.extendleft(reversed(batch))
                    break
            self.left = len(tasks) + len(self.seconds)

    def try_out(self, anchors: Sequence[Anchor], writer: RecordWriter, progress: RolloutProgress) -> None:
        """Asks the judge about texts whose label is known, and adds to the record how often it was right, once all have a verdict. Texts of
        which it is unsure are left out.
        """
        from probescore_audit.record import LabellerRow

        texts = [(anchor.positive, text_of(anchor.rollout.prompt), text_of(anchor.rollout.completion)) for anchor in anchors]
        waiting = deque(JudgeQuestion(positive, prompt or "", completion or "") for positive, prompt, completion in texts)
        said: Counter[tuple[bool, str]] = Counter()
        with self.interruption.held_back():
            try:
                for judged in self.judge.ask(waiting, requests=self._requests_left):
                    if isinstance(judged, JudgeAnswer):
                        said[bool(judged.question.key), judged.verdict] += 1
                    else:
                        self.failures.append(f"an anchor: {judged.reason}")
                    progress.advance()
                    if self.interruption.is_asked:
                        waiting.clear()
            except JudgeError as error:
                self.problem = str(error)
            self.is_spent = bool(waiting) and not self.problem
            if said.total() == len(anchors):
                writer.append(
                    [
                        LabellerRow(
                            source=_SOURCE,
                            labeller=self.judge.model,
                            labeller_version=self.judge.prompt.version,
                            negatives=said[False, "no"] + said[False, "yes"],
                            negatives_right=said[False, "no"],
                            positives=said[True, "no"] + said[True, "yes"],
                            positives_right=said[True, "yes"],
                        )
                    ]
                )

    @property
    def _requests_left(self) -> int | None:
        return None if self.budget is None else max(0, self.budget - self.judge.requests_sent)

    @property
    def _goes_on(self) -> bool:
        return not (self.problem or self.is_spent or self.interruption.is_asked)

    def _ask(self, judge: ChatJudge, tasks: deque[_Task], writer: RecordWriter, progress: RolloutProgress) -> None:
        """Asks the judge about some rollouts; those that were not asked to the end remain in ``tasks``."""
        due = {(task.key, task.planned is None): task for task in tasks}
        tasks.clear()
        shows = judge.prompt.shows_prompt
        waiting = deque(
            JudgeQuestion(name, (task.row.prompt_text or "") if shows else "", task.row.completion_text or "") for name, task in due.items()
        )
        try:
            for judged in judge.ask(waiting, requests=self._requests_left):
                task = due.pop(judged.question.key)  # type: ignore[call-overload] # as it was asked
                if isinstance(judged, JudgeAnswer):
                    writer.append([_label(task, judged, judge, self.keep_answers)])
                    (self.second_verdicts if task.planned is None else self.verdicts)[judged.verdict] += 1
                    if task.planned is not None and judged.verdict == "yes" and task.key in self._unflagged:
                        self.seconds.append(_Task(task.row, None))
                else:
                    self.failures.append(f"step {task.row.step}, rollout {task.row.rollout}: {judged.reason}")
                progress.advance()
                if self.interruption.is_asked:
                    waiting.clear()
        except JudgeError as error:
            self.problem = str(error)
        tasks.extendleft(reversed(due.values()))
        self.is_spent = self._requests_left == 0 and bool(due)


def _label(task: _Task, judged: JudgeAnswer, judge: ChatJudge, keep_answer: bool) -> LabelRow:
    from probescore_audit.record import LabelRow

    row, planned = task.row, task.planned
    return LabelRow(
        step=row.step,
        rollout=row.rollout,
        label=judged.verdict,
        source=_SOURCE,
        text_sha256=row.text_sha256,
        labeller=judge.model,
        labeller_version=judge.version_of(judged),
        inclusion=None if planned is None else planned.inclusion,
        stratum=None if planned is None else planned.stratum,
        floor=planned is not None and planned.floor,
        second=planned is None,
        population=None if planned is None else planned.population,
        note=judged.text.strip()[:_LONGEST_NOTE] if keep_answer else None,
    )


def _planned(record: Record, per_step: int, probe: str, reading: str, first_step: int, last_step: int | None) -> tuple[PlannedLabel, ...]:
    from probescore_audit import plan_recorded

    if last_step is None and record.rollouts:
        last = record.rollouts[-1].step
        last_step = last if last + 1 >= record.header.planned_steps else last - 1  # training may not be through with it
    return plan_recorded(record, per_step, probe=probe, reading=reading, first_step=first_step, last_step=last_step, complete=True)


def _of_plan(record: Record, file: Path) -> tuple[PlannedLabel, ...]:
    """Reads a plan from a file, and leaves out rollouts that have labels.

    Raises:
        ValueError: a line is none of a plan, or is of no rollout of the record.
    """
    from probescore_audit import PlannedLabel, label_rows

    lines = list(label_lines(str(file)))
    if not lines or any("inclusion" not in line for line in lines):
        raise ValueError(f"{file}: no plan; give what 'probescore labels plan' has written")
    known = {(label.step, label.rollout) for label in record.labels}
    open_lines = [line for line in lines if (line.get("step"), line.get("rollout")) not in known]
    names = ("step", "rollout", "stratum", "inclusion", "floor", "population")
    # as if each were labelled, so that what is wrong with a line is said before the judge is asked
    label_rows(record, [{**line, "label": "unsure"} for line in open_lines], source=_SOURCE)
    return tuple(PlannedLabel(**{name: line[name] for name in names if name in line}) for line in open_lines)


def _untried(record: Record, judge: ChatJudge, file: Path) -> tuple[Anchor, ...]:
    """Returns the anchors of a file on which a judge is to be tried; none if the record says already how it did with this prompt.

    Raises:
        ValueError: an anchor is token ids, which the judge cannot read.
    """
    anchors = read_anchors(file)
    for anchor in anchors:
        if text_of(anchor.rollout.completion) is None or (judge.prompt.shows_prompt and text_of(anchor.rollout.prompt) is None):
            raise ValueError(f"--known: {file.name}: the anchor {anchor.name} is token ids; make anchors of texts")
    done = {(row.source, row.labeller, row.labeller_version) for row in record.labellers}
    return () if (_SOURCE, judge.model, judge.prompt.version) in done else anchors


def _check_texts(tasks: Sequence[_Task], judge: ChatJudge, again: ChatJudge | None) -> None:
    shows_prompt = judge.prompt.shows_prompt or (again is not None and again.prompt.shows_prompt)
    for field_name, is_needed in (("completion_text", True), ("prompt_text", shows_prompt)):
        lacking = [task for task in tasks if is_needed and getattr(task.row, field_name) is None]
        if lacking:
            first = lacking[0].row
            raise ValueError(
                f"the record has no {field_name} of {len(lacking)} of {len(tasks)} rollouts to label, such as {first.rollout!r} of step "
                f"{first.step}; let the trainer keep texts in the record, or leave such steps out with --first-step and --last-step"
            )


def _parameters(written: str) -> dict[str, Any]:
    if not written:
        return {}
    try:
        values = json.loads(written)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"--parameters: {written!r:.60}; give a JSON object, such as '{{\"temperature\": 0}}'")
    return values


@contextmanager
def _alone(run: Path) -> Iterator[None]:
    """Context manager within which no other process has a judge at work on the same record: both would ask about the same rollouts."""
    if not run.is_dir():
        raise FileNotFoundError(f"{run.name}: no record; give the folder that was named as `record`")
    try:
        import fcntl
    except ImportError:  # not on this system
        yield
        return
    with (run / "judge.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{run.name}: another 'probescore labels judge' is at work on this record; let it end") from None
        yield


def _say_result(session: _Judging) -> None:
    counts = ", ".join(f"{session.verdicts[word]:,} {word}" for word in ("yes", "no", "unsure"))
    new_console().print(f"labelled {session.verdicts.total():,} rollouts: {counts}", soft_wrap=True)
    if session.second_verdicts:
        confirmed, judged = session.second_verdicts["yes"], session.second_verdicts.total()
        new_console().print(f"judged {judged:,} unflagged positives again: {confirmed:,} confirmed", soft_wrap=True)
    if session.failures:
        say(f"{len(session.failures):,} rollouts have no verdict, and can be asked again; the first: {session.failures[0]}")
    if session.problem:
        say(f"the judge was asked no further: {session.problem}")
    if session.left:
        why = ", since the budget is spent" if session.is_spent else ""
        say(f"{session.left:,} rollouts are left{why}; the same command goes on with them")
