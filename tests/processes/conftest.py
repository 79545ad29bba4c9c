import pytest

from tests.processes.pool import Pool


@pytest.fixture(scope="package")
def pool():
    """Four processes; two of them make a group too."""
    made = Pool(4)
    yield made
    made.stop()
