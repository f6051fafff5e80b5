"""One app for the API's doorbell and the workers, set as this table says, and every setting in force."""

import pickle
from datetime import timedelta
from typing import Any

import pytest
from celery import Celery
from celery.app.defaults import SETTING_KEYS
from kombu.transport.redis import Channel

from service.adapters.celery_bell import is_bell
from service.adapters.celery_queue import LONGEST_RING, RING_TASK, celery_app, queue_name
from service.core.controls import PLATFORM_CEILINGS

URL = "redis://127.0.0.1:6379/0"
CEILING_AND_LADDER_S = 900 + 120

TABLE: dict[str, Any] = {
    "accept_content": ["json"],
    "result_accept_content": ["json"],
    "task_serializer": "json",
    "result_serializer": "json",
    "event_serializer": "json",
    "task_ignore_result": True,
    "result_backend": None,
    "task_acks_late": True,
    "task_reject_on_worker_lost": True,
    "task_acks_on_failure": True,
    "task_acks_on_timeout": True,
    "worker_prefetch_multiplier": 1,
    "worker_disable_prefetch": True,
    "task_soft_time_limit": CEILING_AND_LADDER_S + 30,
    "task_time_limit": CEILING_AND_LADDER_S + 60,
    "worker_max_tasks_per_child": 50,
    "worker_max_memory_per_child": 300_000,
    "worker_cancel_long_running_tasks_on_connection_loss": False,  # docs/adr/0004
    "worker_soft_shutdown_timeout": 30,
    "broker_connection_max_retries": None,
    "broker_channel_error_retry": True,
    "worker_enable_remote_control": False,
    "worker_send_task_events": False,
}
TRANSPORT = {
    "unacked_restore_interval": 10,
    "unacked_restore_throttle": 1,
    "socket_keepalive": True,
    "health_check_interval": 25,
}


@pytest.fixture
def app() -> Celery:
    return celery_app(URL)


@pytest.mark.parametrize("name", TABLE)
def test_each_setting_of_the_table_has_its_value(app: Celery, name: str) -> None:
    assert app.conf[name] == TABLE[name]


def test_each_setting_of_the_table_is_one_that_this_celery_knows() -> None:
    assert set(TABLE) - set(SETTING_KEYS) == set()


def test_the_transport_is_told_what_the_table_says_and_knows_the_words(app: Celery) -> None:
    options = app.conf.broker_transport_options

    assert options.items() >= TRANSPORT.items()
    assert set(options) - set(Channel.from_transport_options) == set()


def test_no_message_is_delivered_again_while_the_longest_run_may_still_be_acted_on(app: Celery) -> None:
    timeouts = {
        app.conf.broker_transport_options["visibility_timeout"],
        app.conf.result_backend_transport_options["visibility_timeout"],
        app.conf.visibility_timeout,
    }

    assert len(timeouts) == 1
    assert timeouts.pop() > max(CEILING_AND_LADDER_S + 90, app.conf.task_time_limit)


def test_a_longer_ring_moves_every_limit_above_it() -> None:
    longer = celery_app(URL, longest_ring=LONGEST_RING + timedelta(seconds=300))

    assert longer.conf.task_soft_time_limit == TABLE["task_soft_time_limit"] + 300
    assert longer.conf.task_time_limit == TABLE["task_time_limit"] + 300
    assert longer.conf.broker_transport_options["visibility_timeout"] > longer.conf.task_time_limit


def test_the_limits_stand_above_the_platforms_ceiling_of_wall(app: Celery) -> None:
    assert app.conf.task_soft_time_limit > PLATFORM_CEILINGS.wall.total_seconds()


def test_the_app_has_no_task_of_celerys_own(app: Celery) -> None:
    assert list(app.tasks) == []


def test_a_task_takes_its_promises_from_the_settings(app: Celery) -> None:
    @app.task(name=RING_TASK)  # type: ignore[untyped-decorator]  # Celery has no types
    def ring() -> None: ...

    assert (ring.acks_late, ring.acks_on_failure, ring.acks_on_timeout) == (True, True, True)
    assert (ring.reject_on_worker_lost, ring.ignore_result) == (True, True)


@pytest.mark.parametrize("name", ["CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"])
def test_an_environment_variable_that_overrules_us_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "redis://elsewhere:6379/0")

    with pytest.raises(ValueError, match="unset CELERY_BROKER_URL"):
        celery_app(URL)


@pytest.mark.parametrize(
    ("boundary", "queue"),
    [
        ("gvisor", "boundary.gvisor"),
        ("namespace/kata-fc", "boundary.namespace.kata-fc"),
        ("namespace/runc+affinity/a--b-2", "boundary.namespace.runc+affinity.a--b-2"),
    ],
)
def test_each_boundary_has_its_queue(boundary: str, queue: str) -> None:
    assert queue_name(boundary) == queue


@pytest.mark.parametrize(
    "word", ["", "../x", "a b", "a\nb", "unacked\x06\x16", "Gvisor", "/gvisor", "gvisor\n", "gvisor-", "a/-b"]
)
def test_what_is_no_boundary_has_no_queue(word: str) -> None:
    with pytest.raises(ValueError, match="not a boundary"):
        queue_name(word)


class FakeMessage:
    """What kombu hands over of a bell; tests change one thing."""

    def __init__(self, **changed: Any) -> None:
        self.content_type = "application/json"
        self.content_encoding = "utf-8"
        self.body: Any = b'[[], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]'
        self.headers: Any = {
            "task": "workers.ring", "id": "2379903a-dc58-4743-8d16-258ec8843681", "timelimit": [None, None],
            "ignore_result": True, "expires": "2026-11-23T07:49:46.167794+00:00", "eta": None, "retries": 0,
        }  # fmt: skip
        self.properties: Any = {"delivery_tag": "x"}
        self.delivery_info: Any = {"exchange": "", "routing_key": "boundary.gvisor"}
        for header in [name for name in changed if name.startswith("header_")]:
            self.headers[header.removeprefix("header_")] = changed.pop(header)
        self.__dict__.update(changed)


def test_a_bell_is_a_bell() -> None:
    assert is_bell(FakeMessage())


@pytest.mark.parametrize(
    "changed",
    [
        {"content_type": "application/x-python-serialize", "body": pickle.dumps(([], {}, {}))},
        {"content_encoding": "binary"},
        {"body": b'[[1], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]'},
        {"body": b'[[], {}, {"callbacks": [{"task": "x"}], "errbacks": null, "chain": null, "chord": null}]'},
        {"body": 5},
        {"body": None},
        {"headers": None},
        {"headers": []},
        {"properties": 1},
        {"delivery_info": "x"},
        {"header_task": "celery.map"},
        {"header_task": ["workers.ring"]},
        {"header_id": "x\nforged"},
        {"header_id": None},
        {"header_eta": "2099-01-01T00:00:00"},
        {"header_timelimit": [0.001, 0.001]},
        {"header_shadow": "forged"},
        {"header_expires": {}},
        {"header_expires": None},
        {"header_retries": 7},
        {"header_ignore_result": False},
        {"header_compression": "zlib"},
        {"header_stamps": {"x": 1}},
    ],
    ids=repr,
)
def test_whatever_carries_something_is_not_a_bell(changed: dict[str, Any]) -> None:
    assert not is_bell(FakeMessage(**changed))
