"""What the recovery tests share."""

import pytest

from actors.contracts import RecoverySpec
from tests.support.tiny_recovery import tiny_recovery_spec


@pytest.fixture(scope="session")
def tiny_spec(tmp_path_factory: pytest.TempPathFactory) -> RecoverySpec:
    return tiny_recovery_spec(tmp_path_factory.mktemp("recovery"))
