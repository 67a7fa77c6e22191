from collections.abc import Iterator

import pytest

from support.laptop import Laptop, running_laptop


@pytest.fixture(scope="session")
def laptop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laptop]:
    with running_laptop(tmp_path_factory.mktemp("laptop")) as found:
        yield found
