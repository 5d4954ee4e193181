"""Errors that a user can mend: each says in one sentence what is wrong and what would work."""


class CurvlabError(Exception):
    """Something in the request, the data or the environment is not right; the message says what and the way out."""


class UnsupportedError(CurvlabError):
    """A backend cannot compute this right for this model; the message names the module, the backend and what would."""
