"""kombu's Redis transport without scripts: our users of Redis are allowed none (deploy/redis.sh). And without a leak: a
worker outlives any number of acknowledgements that Redis was not there to hear.

kombu restores what dead consumers took under a lock that it releases by a Lua script. Loaded by name (the setting
`broker_transport`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from time import time

from kombu.transport import redis


class _QoS(redis.QoS):
    def restore_visible(self, start: int = 0, num: int | None = 10, interval: int = 10) -> None:
        """As kombu's, with a plain lock that keeps consumers from doing the same work. Should one outlive it, two
        restore at once: each message still once, since that is a transaction of its own."""
        self._vrestore_count += 1
        if (self._vrestore_count - 1) % (interval or 1):
            return
        with self.channel.conn_or_acquire() as client:
            if not client.set(self.unacked_mutex_key, "", nx=True, ex=self.unacked_mutex_expire):
                return
            try:
                until = time() - self.visibility_timeout
                asked = {"desc": True, "byscore": True, "offset": num and start, "num": num}
                for tag in client.zrange(self.unacked_index_key, until, 0, **asked):
                    self.restore_by_tag(tag, client)  # type: ignore[no-untyped-call]
            finally:
                client.delete(self.unacked_mutex_key)

    def ack(self, delivery_tag: str) -> None:
        with self._giving_its_place_back(delivery_tag):
            super().ack(delivery_tag)  # type: ignore[no-untyped-call]

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        with self._giving_its_place_back(delivery_tag):
            super().reject(delivery_tag, requeue=requeue)  # type: ignore[no-untyped-call]

    @contextmanager
    def _giving_its_place_back(self, delivery_tag: str) -> Iterator[None]:
        """Also when Redis cannot be told, which Celery logs and passes over: kombu would count the message as held for
        ever, and a worker whose places are all held so lives, waits for nothing, and never sees that Redis is back."""
        try:
            yield
        except Exception:
            self._quick_ack(delivery_tag)
            raise


class _Channel(redis.Channel):
    QoS = _QoS


class Transport(redis.Transport):
    Channel = _Channel
