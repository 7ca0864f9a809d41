"""Sends single requests to an endpoint that speaks OpenAI's chat protocol, and says of each failure whether it is worth another try."""

from __future__ import annotations

import email.utils
import http.client
import json
import math
import os
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any
from urllib.parse import urlsplit

API_KEY_VARIABLE = "PROBESCORE_JUDGE_API_KEY"
"""Name of the environment variable with the key of a judge's endpoint, unless another one is named."""

_MOST_BYTES = 4 << 20  # of an answer
_PASSING_STATUSES = {408, 409, 425, 429}  # and all from 500 on
_ABOUT_ONE_REQUEST = {400, 413, 422}


class Remedy(Enum):
    """Enumeration of what can be done after a request to a judge's endpoint that failed."""

    TRY_AGAIN = "try again"
    """The request may succeed if it is sent again."""
    SKIP = "skip"
    """The endpoint refuses this request, and may take others."""
    STOP = "stop"
    """The endpoint would refuse every request."""


class EndpointError(RuntimeError):
    """Exception raised when a request to a judge's endpoint gives no answer.

    Attributes:
        remedy: what can be done.
        wait_seconds: seconds that the endpoint asks to wait before the next request; 0 if it does not say.
    """

    def __init__(self, problem: str, remedy: Remedy, wait_seconds: float = 0.0) -> None:
        super().__init__(problem)
        self.remedy = remedy
        self.wait_seconds = wait_seconds


@dataclass(frozen=True)
class ChatReply:
    """Value object with a language model's answer to one request.

    Attributes:
        text: text of the answer; empty if the model refused to give one.
        finished: whether the answer is whole, rather than cut off at its greatest length.
        model: model that answered, as the endpoint names it.
    """

    text: str
    finished: bool
    model: str


class ChatEndpoint:
    """Address of a service that speaks OpenAI's chat protocol. It can be pickled and is safe to use from several threads; each request has
    a connection of its own. Redirects are not followed, so that the key goes nowhere else.

    Args:
        url: address up to the version, such as ``http://localhost:8000/v1``.
        api_key_variable: environment variable with the key; it is read when a request is sent, and kept nowhere. A variable that is not
            set, or empty, means that no key is sent.

    Raises:
        ValueError: the address is none, or has a user or a password in it.
    """

    def __init__(self, url: str, api_key_variable: str = API_KEY_VARIABLE) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise ValueError("endpoint: no address; give one such as http://localhost:8000/v1") from None
        if "@" in parts.netloc:
            raise ValueError(f"endpoint: it has a user or a password in it; give the key in the variable {api_key_variable}")
        is_written_well = url.isascii() and url.isprintable() and " " not in url
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.fragment or not is_written_well:
            raise ValueError(f"endpoint: {url!r:.80} is no address; give one such as http://localhost:8000/v1")
        self.api_key_variable = api_key_variable
        self.host = parts.hostname
        self._is_encrypted = parts.scheme == "https"
        self._port = port or (http.client.HTTPS_PORT if self._is_encrypted else http.client.HTTP_PORT)
        path = parts.path.rstrip("/").removesuffix("/chat/completions")
        self._target = f"{path}/chat/completions" + (f"?{parts.query}" if parts.query else "")

    @property
    def shows_key(self) -> bool:
        """Returns whether a key is sent unencrypted to another machine."""
        return not self._is_encrypted and bool(self._key()) and self.host not in ("localhost", "127.0.0.1", "::1")

    def complete(self, body: Mapping[str, Any], seconds: float) -> ChatReply:
        """Sends one request and returns the model's answer.

        Args:
            body: the request, which can be written as JSON.
            seconds: time after which the request has failed, however slowly or steadily bytes come.

        Raises:
            EndpointError: there is no answer.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        if key := self._key():
            if not key.isascii() or not key.isprintable():
                raise EndpointError(f"the key in {self.api_key_variable} has characters that no key has", Remedy.STOP)
            headers["Authorization"] = f"Bearer {key}"
        kind = http.client.HTTPSConnection if self._is_encrypted else http.client.HTTPConnection
        connection = kind(self.host, self._port, timeout=seconds)
        begun = time.monotonic()
        cut: threading.Timer | None = None
        try:
            connection.connect()
            # a socket's timeout is of one read, and a peer that sends a byte now and then never meets it
            cut = threading.Timer(max(0.0, seconds - (time.monotonic() - begun)), _cut, [connection.sock])
            cut.daemon = True
            cut.start()
            connection.request("POST", self._target, json.dumps(body).encode(), headers)
            response = connection.getresponse()
            content = response.read(_MOST_BYTES + 1)
            status, wait_seconds = response.status, _seconds_to_wait(response.getheader("Retry-After"))
        except ssl.SSLCertVerificationError:
            raise EndpointError(f"the certificate of {self.host} cannot be verified", Remedy.STOP) from None
        except (OSError, http.client.HTTPException) as error:
            late = time.monotonic() - begun >= seconds
            problem = f"no answer within {seconds:g} seconds" if late or isinstance(error, TimeoutError) else _described(error)
            raise EndpointError(problem, Remedy.TRY_AGAIN) from None
        finally:
            if cut is not None:
                cut.cancel()
            connection.close()
        if status != http.client.OK:
            raise self._refusal(status, content, wait_seconds, key)
        return _reply(content)

    def _key(self) -> str:
        return os.environ.get(self.api_key_variable, "").strip()

    def _refusal(self, status: int, content: bytes, wait_seconds: float, key: str) -> EndpointError:
        """Returns the error for an answer with another HTTP status than 200. What the endpoint says of a key is not repeated, since some
        repeat the key.
        """
        if status in (401, 403):
            what = f"the key in {self.api_key_variable}" if key else f"requests without a key; set {self.api_key_variable}"
            return EndpointError(f"the endpoint refuses {what} (status {status})", Remedy.STOP)
        said = _message_in(content)
        if key:
            said = said.replace(key, "…")
        problem = f"status {status}" + (f": {said}" if said else "")
        if status in _PASSING_STATUSES or status >= 500:
            return EndpointError(problem, Remedy.TRY_AGAIN, wait_seconds)
        return EndpointError(problem, Remedy.SKIP if status in _ABOUT_ONE_REQUEST else Remedy.STOP)


def _cut(connection: socket.socket) -> None:
    """Ends a connection whose time is up, so that the thread that reads from it goes on."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _described(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"no connection: {error.strerror}"
    return f"the connection broke ({type(error).__name__})"


def _seconds_to_wait(written: str | None) -> float:
    """Reads the header ``Retry-After``, which has seconds or a date; 0 if it has neither."""
    if written is None:
        return 0.0
    try:
        seconds = float(written)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(written).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def _message_in(content: bytes) -> str:
    """Returns what an endpoint says of an error, on one short line; empty if it says nothing that can be read."""
    try:
        values = json.loads(content)
    except ValueError:
        return ""
    error = values.get("error", values) if isinstance(values, dict) else None
    said = error.get("message") if isinstance(error, dict) else error
    return " ".join(said.split())[:200] if isinstance(said, str) else ""


def _reply(content: bytes) -> ChatReply:
    if len(content) > _MOST_BYTES:
        raise EndpointError(f"the answer has more than {_MOST_BYTES >> 20} MiB", Remedy.SKIP)
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        raise EndpointError("the answer is torn: it is no JSON", Remedy.TRY_AGAIN) from None
    try:
        choice = values["choices"][0]
        text, finish, model = choice["message"].get("content"), choice.get("finish_reason"), values.get("model")
    except (TypeError, KeyError, IndexError, AttributeError):
        raise EndpointError("the answer has not the form of OpenAI's chat protocol: no choices[0].message", Remedy.TRY_AGAIN) from None
    return ChatReply(text if isinstance(text, str) else "", finish in ("stop", "eos", None), model if isinstance(model, str) else "")
