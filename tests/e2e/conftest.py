"""What the end-to-end tests share: the application's side of the bus."""

import secrets
from collections.abc import Iterator

import pytest

from tests.e2e.consumer import Consumer
from tests.stack import Stack


@pytest.fixture(scope="session")
def _consumer(running_stack: Stack) -> Iterator[Consumer]:
    consumer = Consumer(running_stack.ready["redis_url"], group=f"app-{secrets.token_hex(4)}")
    yield consumer
    consumer.close()


@pytest.fixture
def consumer(stack: Stack, _consumer: Consumer) -> Consumer:
    return _consumer
