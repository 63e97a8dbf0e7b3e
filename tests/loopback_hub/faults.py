"""Faults that a Hub and the way to it really have, drawn from a seed for each repository alone."""

import random
import threading
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum


class Fault(Enum):
    """What goes wrong with one request."""

    BUSY = "429, with Retry-After"
    BROKEN = "500"
    DOWN = "503"
    CUT_REQUEST = "the connection breaks while the body is read"
    CUT_ANSWER = "it is done, and the connection breaks in the middle of the answer"
    NO_ANSWER = "it is done, and the connection breaks before the answer"
    BROKEN_YET_DONE = "it is done, and the answer is 500"
    CONFLICT = "409 on a commit"
    RIVAL = "somebody else commits just before, so that the parent is no longer the head"
    EXPIRED = "401: the token has expired"


PASSING = tuple(fault for fault in Fault if fault is not Fault.EXPIRED)
OF_COMMITS = {Fault.CONFLICT, Fault.RIVAL}


@dataclass
class Faults:
    """Draws faults.

    A draw depends on the seed, the repository, the kind of request and how often it came: not on what other
    threads do meanwhile.

    Attributes:
        seed: of the draws.
        rate: share of requests that go wrong.
        most: of one kind of request of one repository at most so many.
        kinds: to draw from.
        of: the requests that may go wrong; all where it is empty.
    """

    seed: int
    rate: float
    most: int
    kinds: tuple[Fault, ...] = PASSING
    of: tuple[str, ...] = ()
    _times: Counter[tuple[str, str]] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def draw(self, repo, request):
        """The fault of this request, or None."""
        with self._lock:
            self._times[repo, request] += 1
            time = self._times[repo, request]
        generator = random.Random(f"{self.seed} {repo} {request} {time}")
        special = [kind for kind in self.kinds if kind in OF_COMMITS and request == "commit"]
        usual = [kind for kind in self.kinds if kind not in OF_COMMITS]
        more = special and (not usual or generator.random() < 0.5)  # commits are few, their own faults shall not be
        kinds = special if more else usual
        may = kinds and time <= self.most and (not self.of or request in self.of)
        return generator.choice(kinds) if may and generator.random() < self.rate else None
