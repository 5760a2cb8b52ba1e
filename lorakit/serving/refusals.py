"""Refusals: a request that gets an error object of OpenAI's form instead of an answer.

    {"error": {"message": "...", "type": "invalid_request_error", "param": "top_p", "code": "..."}}

The status says whose fault it is: 4xx the request's, 5xx the server's.
"""

from typing import Any


class Refusal(Exception):
    """A request that is refused, with the status and the error object that its client gets."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        """Word a refusal.

        Args:
            status: The HTTP status.
            message: One sentence: what is wrong, where, and what to do.
            param: The field of the request that is wrong.
            code: OpenAI's short name of the kind of error.
            headers: More headers of the response.
        """
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def shutting_down() -> Refusal:
    """Return what requests get while the server stops."""
    return Refusal(
        503,
        "The server is shutting down: ask again when it runs.",
        code="service_unavailable",
    )


def not_found(model: str, names: list[str]) -> Refusal:
    """Return what a request gets that names a model which is not served."""
    return Refusal(
        404,
        f"The model {model[:100]!r} does not exist; there are {', '.join(names)}.",
        param="model",
        code="model_not_found",
    )
