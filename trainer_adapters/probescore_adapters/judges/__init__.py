"""Asks a judge, a language model behind an endpoint that speaks OpenAI's chat protocol, whether rollouts have a behaviour.

    judge = ChatJudge("http://localhost:8000/v1", "a-model", JudgePrompt.read("cheating.txt"))
    for answer in judge.ask(deque([JudgeQuestion(key="7", prompt="Sort 3 1 2.", completion="1 2 3")])):
        print(answer)

It needs the standard library alone, and threads; nothing here knows a trainer, a probe or a record.
"""

from probescore_adapters.judges.endpoint import API_KEY_VARIABLE
from probescore_adapters.judges.judge import ChatJudge
from probescore_adapters.judges.questions import JudgeAnswer, JudgeError, JudgeFailure, JudgePrompt, JudgeQuestion

__all__ = ["API_KEY_VARIABLE", "ChatJudge", "JudgeAnswer", "JudgeError", "JudgeFailure", "JudgePrompt", "JudgeQuestion"]
