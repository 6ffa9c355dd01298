"""When a call is made again, and after how long. Pure: chance and clock are handed in.

A call that never reached the service, or that it refused because it was busy, can always be made again. What may have
been done already is only repeated where that does no harm: reading, asking, and an update, whose key makes it count
once.
"""

import email.utils
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from ..errors import RadianceError
from .arguments import is_number, unfit

#: refusals after which nothing is done yet; of the service's own 503s, those that pass
BUSY_STATUS = (429, 503)
LASTING = frozenset({"anchors_unavailable", "dataset_unavailable"})
#: what happens before a request is on its way
UNSENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
NEVER = (httpx.LocalProtocolError, httpx.UnsupportedProtocol)
#: no `Retry-After` is waited for longer, whatever the patience: no sleep takes any number
LONGEST_AFTER_S = 366 * 86400.0
#: so often a wait is doubled; more is beyond every `longest_s`, and soon beyond a float
DOUBLED = 64


@dataclass(frozen=True)
class Retry:
    """At most `attempts` calls, waiting in between: `first_s`, then twice as long each time, up to `longest_s`.

    Each wait is shortened by up to half at random, so that many clients do not come back together. A `Retry-After` of
    the service counts where it is longer, up to `patience_s`; beyond that the error is raised. With `absent` a service
    that is not there at the first attempt is waited for, too. `Retry(attempts=1)` makes every call once. Raises
    `ConfigError` for values that are none of that.
    """

    attempts: int = 6
    first_s: float = 0.25
    longest_s: float = 8.0
    patience_s: float = 60.0
    absent: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.attempts, int) or isinstance(self.attempts, bool) or self.attempts < 1:
            raise unfit("attempts", self.attempts, "a whole number, 1 (the first call alone) at least")
        for name in ("first_s", "longest_s", "patience_s"):
            given = getattr(self, name)
            if not is_number(given) or given < 0:
                raise unfit(name, given, "seconds: a number, 0 at least")
        if not isinstance(self.absent, bool):
            raise unfit("absent", self.absent, "True or False")

    def wait_s(self, attempt: int, after_s: float | None, draw: Callable[[], float]) -> float | None:
        """Seconds until the attempt after `attempt` (1 is the first), or None: there is none."""
        if attempt >= self.attempts or (after_s is not None and after_s > min(self.patience_s, LONGEST_AFTER_S)):
            return None
        own = min(self.longest_s, self.first_s * 2.0 ** min(attempt - 1, DOUBLED))
        return max(own * (1 - draw() / 2), after_s or 0.0)

    def may_follow(self, error: httpx.HTTPError, attempt: int, *, repeatable: bool, keyed: bool) -> bool:
        """Whether a call that failed so may be made again. `keyed`: it counts once, however often it comes."""
        if isinstance(error, NEVER):
            return False
        if isinstance(error, UNSENT):
            return self.absent or attempt > 1
        if isinstance(error, httpx.TimeoutException):  # it may still be at work
            return keyed
        return repeatable


RETRY = Retry()
NO_RETRY = Retry(attempts=1)


def passes(error: RadianceError) -> bool:
    """Whether the service may think otherwise in a moment."""
    return error.status in BUSY_STATUS and error.code not in LASTING


def retry_after(response: httpx.Response, now: Callable[[], float] = time.time) -> float | None:
    """Seconds, from a number or a date; None without a header, and for one that says neither."""
    text = response.headers.get("retry-after", "").strip()
    if not text:
        return None
    try:
        seconds = float(text)  # infinite for a number with too many digits
        return None if math.isnan(seconds) else max(0.0, seconds)
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - now())
    except (ValueError, OverflowError):  # the latter for a year that no date has
        return None
