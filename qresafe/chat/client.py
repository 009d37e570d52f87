"""One client for any server that speaks OpenAI's chat API, with its failures in words."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from qresafe.errors import ModelError, nearest
from qresafe.redaction import redact

KEY = "OPENAI_API_KEY"  # only from the environment: specs are stored beside the results
CHECK_SECONDS = 10.0

_KINDS = {
    "RateLimitError": "rate limit",
    "APITimeoutError": "time-out",
    "APIConnectionError": "no connection",
    "InternalServerError": "server error",
    "BadRequestError": "refused request",
    "NotFoundError": "refused request",
    "UnprocessableEntityError": "refused request",
}


class Reply(BaseModel):
    """What a server answered to one request.

    Attributes:
        text: The answer; empty where there is none.
        finish: "stop", "length" (cut at the limit), or "error".
        prompt_tokens: As the server counts; 0 if it does not say.
        new_tokens: Likewise.
        top: The likeliest first tokens and their log-probabilities, where they were asked for.
        error: Why there is no answer; None if there is one.
    """

    model_config = ConfigDict(frozen=True)

    text: str = ""
    finish: str = "error"
    prompt_tokens: int = 0
    new_tokens: int = 0
    top: dict[str, float] | None = None
    error: str | None = None


def connect(url: str, *, timeout: float, retries: int) -> Any:
    """Return a client; nothing is sent yet.

    Rate limits, server errors and time-outs are tried again with growing pauses by the `openai`
    package, which also waits as long as a server's Retry-After says.

    Raises:
        ModelError: There is no key in the environment.
    """
    import openai

    key = os.environ.get(KEY)
    if not key:
        remedy = f"export {KEY} (any word will do for a server without keys)"
        raise ModelError(f"no {KEY} in the environment", where=url, remedy=remedy)
    return openai.OpenAI(api_key=key, base_url=url, timeout=timeout, max_retries=retries)


def check_server(url: str, model: str, setting: str) -> None:
    """Ask a server for its models, before any work.

    Args:
        url: The server's base URL.
        model: The model that will be asked.
        setting: The spec's key of the URL, for the message.

    Raises:
        ModelError: No key, no answer, a refused key, or a model that is not served there.
    """
    import openai

    client = connect(url, timeout=CHECK_SECONDS, retries=1)
    try:
        served = [entry.id for entry in client.models.list()]
    except (openai.AuthenticationError, openai.PermissionDeniedError):
        raise _refused_key(url) from None
    except openai.APIConnectionError as error:
        cause = error.__cause__ or error
        remedy = f"start the server, or mend {setting} (it usually ends in /v1)"
        raise ModelError(f"no answer ({cause})", where=url, remedy=remedy) from None
    except (openai.APIError, ValueError):
        return  # it answers, but has no list of models: some servers do not
    if served and model not in served:
        raise ModelError(f"no model {model!r}", where=url, remedy=nearest(model, served))


def send(client: Any, request: Mapping[str, Any]) -> Reply:
    """Return the answer to one request, or a reply that says why there is none.

    Raises:
        ModelError: The key is refused, or the server is gone: every other request would fail
            likewise, and rows of such an hour would be undecided for good.
    """
    import openai

    try:
        reply = client.chat.completions.create(**request)
        choice, used = reply.choices[0], reply.usage
        text, finish = choice.message.content, choice.finish_reason
        top = _first_token(choice) if request.get("logprobs") else None
    except (openai.AuthenticationError, openai.PermissionDeniedError):
        raise _refused_key(str(client.base_url)) from None
    except (openai.OpenAIError, ValueError, TypeError, LookupError, AttributeError) as error:
        if _is_gone(client, error):
            remedy = "start the server and give the same command again: what was answered is kept"
            raise ModelError(
                "the server is gone", where=str(client.base_url), remedy=remedy
            ) from None
        return Reply(error=_reason(error))
    if finish not in ("stop", "length") or text is None:
        return Reply(error=f"no answer: finish_reason {finish!r}")
    return Reply(
        text=text,
        finish=finish,
        prompt_tokens=used.prompt_tokens if used else 0,
        new_tokens=used.completion_tokens if used else 0,
        top=top,
    )


def _is_gone(client: Any, error: Exception) -> bool:
    """Return whether nothing is there any more; else the one request alone was at fault."""
    import openai

    lost = isinstance(error, openai.APIConnectionError)
    if not lost or isinstance(error, openai.APITimeoutError):
        return False
    try:
        client.with_options(timeout=CHECK_SECONDS, max_retries=1).models.list()
    except openai.APIConnectionError as silence:
        return not isinstance(silence, openai.APITimeoutError)
    except (openai.APIError, ValueError):  # it answers, if not this
        return False
    return False


def _first_token(choice: Any) -> dict[str, float] | None:
    content = choice.logprobs.content if choice.logprobs else None
    return {top.token: top.logprob for top in content[0].top_logprobs} if content else None


def _refused_key(url: str) -> ModelError:
    return ModelError("the key is refused", where=url, remedy=f"check {KEY}")


def _reason(error: Exception) -> str:
    kind = _KINDS.get(type(error).__name__, "malformed answer")
    # Redacted before it is cut: half a key would not be recognised.
    return f"{kind}: {redact(' '.join(str(error).split()))[:200]}"
