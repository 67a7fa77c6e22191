"""PURE. What can go wrong with a request to the API server."""


class ApiError(Exception):
    """The API server refused: `status` is the HTTP code (0: it was not reached), `reason` that of metav1.Status."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}" if status else f"{reason}: {message}")
        self.status = status
        self.reason = reason


class TooLarge(ApiError):
    """The answer has more bytes than were allowed."""

    def __init__(self, what: str, most: int) -> None:
        super().__init__(0, "TooLarge", f"{what}: the answer has more than {most} bytes")


class BadName(ApiError):
    """A name or a label value that no object of an API server can have; nothing was asked."""

    def __init__(self, message: str) -> None:
        super().__init__(0, "BadName", message)
