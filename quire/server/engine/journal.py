"""The journal: what is in flight, and all of it that another engine needs in order to go on: prompt, parameters, seed, and the
tokens that were put out so far. Pure bookkeeping; it sends nothing.

A request that keeps killing engines must not take the others with it. Each death without a new token in between is held against
those that the engine had; after two crashes a request is suspected and tried alone, until it has made a token. Where the engine
dies twice with nothing else in it, the request fails, and the others go on. Once is not enough: beams, and prompts that wait, have no
token to show for a long time, and whoever kills engines from outside hits one of them that is tried alone sooner or later.

SIGKILL comes from outside: from an administrator, or from a kernel that is short of memory. It says little about a request, and trying
requests alone holds the others up; so it takes six of them to make a suspect.

An engine that ends because a form of structured output could not be followed says whose fault it was: of those that have a form. One that
is the only one fails at once; several are tried alone.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from quire.core.sequence import Request
from quire.outputs import SequenceOutput
from quire.server.engine.messages import Death

CRASH, KILL = 3, 1
"""What a death is held against a request: one of the engine's own making, or by whoever needs no reason. Alone it is always CRASH."""
SUSPECT_AT, FAIL_AT = 2 * CRASH, 4 * CRASH


@dataclass(slots=True)
class Entry:
    """One request in flight."""

    request: Request
    emitted: list[list[int] | None] = field(default_factory=list)
    """The tokens of each sequence so far; None for one that has ended."""
    deaths: int = 0
    """Engines that died under it since it made a token."""
    blame: int = 0
    """What they amount to."""
    sent: bool = False
    """The engine that runs now has it."""
    added: float = 0.0
    """When it was submitted, by the client's clock."""
    waited_s: float = 0.0
    """Until it was sent to an engine, the last time."""

    def __post_init__(self) -> None:
        self.emitted = [[] for _ in range(self.request.params.num_outputs)]

    @property
    def resumed(self) -> list[list[int] | None]:
        """What to tell an engine of it besides the request: nothing, if nothing has happened yet."""
        return self.emitted if any(tokens is None or tokens for tokens in self.emitted) else []


class Journal:
    """Entries in the order of their submission."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._unsent: deque[Entry] = deque()
        self._suspects: deque[Entry] = deque()
        self._alone: Entry | None = None

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_suspects(self) -> int:
        """Requests that wait to be run alone, or are."""
        return len(self._suspects) + (self._alone is not None)

    @property
    def num_unsent(self) -> int:
        """Sequences in flight that no engine has."""
        return sum(tokens is not None for entry in self._entries.values() if not entry.sent for tokens in entry.emitted)

    def add(self, request: Request, now: float = 0.0) -> None:
        entry = self._entries[request.request_id] = Entry(request, added=now)
        self._unsent.append(entry)

    def note(self, output: SequenceOutput) -> None:
        """The engine has made something."""
        entry = self._entries.get(output.request_id)
        if entry is None:
            return
        tokens = entry.emitted[output.index]
        if tokens is not None:
            tokens += output.token_ids
        if output.token_ids:
            self._acquit(entry)
        if output.finish_reason is not None:
            self.end(output.request_id, output.index)

    def note_tokens(self, tokens: list[tuple[str, int, int]]) -> None:
        """The same for sequences that have made a token, and nothing else: request id, index, token."""
        entries = self._entries
        for request_id, index, token in tokens:
            entry = entries.get(request_id)
            if entry is None or (emitted := entry.emitted[index]) is None:
                continue
            emitted.append(token)
            if entry.deaths:
                self._acquit(entry)

    def emitted(self, request_id: str) -> list[int] | None:
        """The tokens of a request's first sequence, while it has not ended. Whoever hears of another may put it there itself while the
        request ``is_clear``."""
        entry = self._entries.get(request_id)
        return None if entry is None else entry.emitted[0]

    def waited_s(self, request_id: str) -> float:
        """How long a request waited for an engine that took it."""
        entry = self._entries.get(request_id)
        return 0.0 if entry is None else entry.waited_s

    def is_clear(self, request_id: str) -> bool:
        """No engine has died under it since it made a token."""
        entry = self._entries.get(request_id)
        return entry is not None and entry.deaths == 0

    def end(self, request_id: str, index: int | None = None) -> bool:
        """Nothing more is wanted of a request, or of one sequence of it. Whether the engine knows it."""
        entry = self._entries.get(request_id)
        if entry is None:
            return False
        for i in range(len(entry.emitted)) if index is None else (index,):
            entry.emitted[i] = None
        if all(tokens is None for tokens in entry.emitted):
            del self._entries[request_id]
            if entry is self._alone:
                self._alone = None
        return entry.sent

    def due(self) -> list[Entry]:
        """What is to be sent to the engine now; it counts as sent."""
        if self._alone is not None:
            return []
        while self._suspects:
            entry = self._suspects.popleft()
            if self._lives(entry):
                self._alone, entry.sent = entry, True
                return [entry]
        due = [entry for entry in self._unsent if self._lives(entry)]
        self._unsent.clear()
        for entry in due:
            entry.sent = True
        return due

    def engine_died(self, death: Death = "crash") -> list[Entry]:
        """Nothing is sent any more. The requests that have failed now, and are in the journal no longer."""
        sent = [entry for entry in self._entries.values() if entry.sent]
        blamed = sent if death != "form" else [entry for entry in sent if entry.request.params.structured is not None] or sent
        most = FAIL_AT if len(blamed) == 1 else SUSPECT_AT  # in company it may have been another's fault
        for entry in blamed:
            blame = most if death == "form" else KILL if death == "kill" and entry is not self._alone else CRASH
            entry.deaths, entry.blame = entry.deaths + 1, min(entry.blame + blame, most)
        for entry in sent:
            entry.sent = False
        failed = [entry for entry in blamed if entry.blame >= FAIL_AT]
        for entry in failed:
            del self._entries[entry.request.request_id]
        self._alone = None
        self._suspects = deque(entry for entry in self._entries.values() if entry.blame >= SUSPECT_AT)
        self._unsent = deque(entry for entry in self._entries.values() if entry.blame < SUSPECT_AT)
        return failed

    def _acquit(self, entry: Entry) -> None:
        entry.deaths = entry.blame = 0
        if entry is self._alone:
            self._alone = None

    def _lives(self, entry: Entry) -> bool:
        return self._entries.get(entry.request.request_id) is entry
