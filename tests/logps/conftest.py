import pytest

from sppo_kernels import testing


@pytest.fixture
def poisoned_empty():
    """Memory that is allocated and not written holds NaN."""
    with testing.poisoned_empty():
        yield
