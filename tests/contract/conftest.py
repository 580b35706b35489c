"""Engines that are to pass the contract."""

from __future__ import annotations

import pytest
from tests.engine_subject import Subject, subject_named
from tests.engines_here import engines, real_engines


@pytest.fixture(params=engines())
def subject(request: pytest.FixtureRequest) -> Subject:
    return subject_named(request.param)


@pytest.fixture(params=real_engines())
def real(request: pytest.FixtureRequest) -> Subject:
    return subject_named(request.param)


@pytest.fixture(params=engines("embedding"))
def encoding(request: pytest.FixtureRequest) -> Subject:
    """One that serves encoders as well."""
    return subject_named(request.param)


@pytest.fixture(params=real_engines("embedding"))
def really_encoding(request: pytest.FixtureRequest) -> Subject:
    """A real one that serves encoders as well."""
    return subject_named(request.param)
