"""Rate limiting: a token bucket per client."""

import threading
from collections.abc import Iterable
from time import monotonic


class RateLimit:
    """A token bucket per client: `burst` requests at once, then `per_second`."""

    MAX_CLIENTS = 10_000

    def __init__(self, per_second: float, burst: int) -> None:
        self.per_second, self.burst = per_second, burst
        self._lock = threading.Lock()
        self._buckets: dict[str, tuple[float, float]] = {}  # tokens, and the time at which they were counted

    def wait(self, client: str) -> float:
        """Takes a token and returns 0, or returns the seconds until one is available."""
        now = monotonic()
        with self._lock:
            tokens = self._tokens(client, now)
            if tokens < 1:
                return (1 - tokens) / self.per_second
            if len(self._buckets) >= self.MAX_CLIENTS and client not in self._buckets:
                self._evict(now)
            self._buckets[client] = (tokens - 1, now)
        return 0.0

    def _tokens(self, client: str, now: float) -> float:
        tokens, then = self._buckets.get(client, (float(self.burst), now))
        return min(float(self.burst), tokens + (now - then) * self.per_second)

    def _evict(self, now: float) -> None:
        """Drops clients whose buckets are full again; if there are none, the older half of all clients."""
        full = [client for client in self._buckets if self._tokens(client, now) >= self.burst]
        evicted: Iterable[str] = full or list(self._buckets)[: self.MAX_CLIENTS // 2]
        for client in evicted:
            del self._buckets[client]
