"""A hub with all that the configs name and with what a user may run into, and commands that ask it."""

from collections.abc import Iterator

import pytest
from hub_contents import fill, fill_with_faults
from hub_runs import Commands
from hub_server import Hub


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    hub = fill_with_faults(fill(Hub(), folder), folder).start()
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def commands(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Commands, Commands]]:
    """Two processes with one cache, of which the second is offline by its environment."""
    home = tmp_path_factory.mktemp("home")
    online = Commands(hub.endpoint, home, tmp_path_factory.mktemp("online"))
    offline = Commands(hub.endpoint, home, tmp_path_factory.mktemp("offline"), HF_HUB_OFFLINE="1")
    yield online, offline
    online.close()
    offline.close()


@pytest.fixture
def online(commands: tuple[Commands, Commands]) -> Commands:
    return commands[0]


@pytest.fixture
def offline(commands: tuple[Commands, Commands]) -> Commands:
    return commands[1]
