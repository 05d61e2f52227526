"""The way of a token with nothing else to it, from the step's message to its client's socket. Most of what is ever sent goes here, and
between two steps an engine has emptied the caches: so one object has all that such a token needs, and no Python runs for it."""

from collections.abc import Mapping

class Express:
    """One sequence's: the only one of its stream, whose response has begun and wants nothing but text."""

    def __init__(self, emitted: list[int], texts: Mapping[int, bytes | None], before: bytes, after: bytes) -> None:
        """emitted: the journal's list of the sequence's tokens. texts: token → its text within a JSON string, None where it has no text
        of its own. before, after: what stands around the text in an event."""
    fd: int
    """The socket, while bytes may be written to it past its transport; else -1."""
    waits: bool
    """The stream's reader waits, and has read all that came before."""
    between: bool
    """The text so far ends with a whole character, and nothing of it is held back."""
    last: float
    """When the sequence last made a token, in seconds of the meter's clock."""
    taken: int
    """Tokens that went this way; whoever counts them sets it to 0."""

def carry(
    tokens: list[tuple[str, int, int]], ways: dict[str, Express], now: float
) -> tuple[list[tuple[str, int, int]], list[tuple[float, int]], list[tuple[str, bytes]]]:
    """Sends the tokens (request id, index, token) of a step that may go this way now, each as one part of a chunked body. First all
    are put together, then all are written: so that each kind of work finds its code in the caches.

    ways: by request id; a request that has one has one sequence. Returns the other tokens; since when tokens were awaited and by how many
    sequences; and, by request id, bytes that a socket did not take, whose ``fd`` is -1 then. Call on the thread
    of the event loop that has the sockets. Does not raise.
    """
