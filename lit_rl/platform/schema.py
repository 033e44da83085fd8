"""The tables of the service's database, and how a database of an earlier release becomes one of today."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

metadata = sa.MetaData()


def _table(name: str, *columns: sa.schema.SchemaItem, **options: Any) -> sa.Table:
    return sa.Table(name, metadata, *columns, **options)


jobs = _table(
    "jobs",
    sa.Column("seq", sa.Integer, primary_key=True),  # never given to a second job, as pages of a list begin at it
    sa.Column("uuid", sa.Text, nullable=False, unique=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False, index=True),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("description", sa.Text, nullable=False),
    sa.Column("notes", sa.Text, nullable=False),
    sa.Column("tags", sa.JSON, nullable=False),
    sa.Column("fields", sa.JSON, nullable=False),  # what the job was asked with: the guide's fields, template, overrides
    sa.Column("problems", sa.JSON, nullable=False),
    sa.Column("gpu_ids", sa.JSON, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),  # seconds since 1970, as all times here
    sa.Column("queued_at", sa.Float),
    sa.Column("started_at", sa.Float),
    sa.Column("ended_at", sa.Float),
    sa.Column("stop_requested_at", sa.Float),
    sa.Column("kill_at", sa.Float),  # when a job that was asked to stop is ended by force
    sa.Column("reported_at", sa.Float),
    sa.Column("returncode", sa.Integer),
    sa.Column("signal", sa.Text),
    sa.Column("reason", sa.Text),
    sa.Column("parent_uuid", sa.Text),
    sa.Column("checkpoint", sa.Text),  # what the job continues from
    sa.Column("step", sa.Integer),
    sa.Column("max_steps", sa.Integer),
    sa.Column("epoch", sa.Integer),
    sa.Column("idempotency_key", sa.Text, unique=True),
    sqlite_autoincrement=True,
)
metric_keys = _table(
    "metric_keys",
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("job", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.UniqueConstraint("job", "name"),
)
points = _table(
    "points",
    sa.Column("key", sa.Integer, primary_key=True),
    sa.Column("step", sa.Integer, primary_key=True),
    sa.Column("value", sa.Float),  # NULL for what is not finite
    sqlite_with_rowid=False,
)
steps = _table(
    "steps",
    sa.Column("job", sa.Text, primary_key=True),
    sa.Column("step", sa.Integer, primary_key=True),
    sa.Column("ts", sa.Float, nullable=False),
    sa.Column("epoch", sa.Integer),
    sqlite_with_rowid=False,
)
checkpoints = _table(
    "checkpoints",
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("job", sa.Text, nullable=False),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("eval_results", sa.JSON),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("chosen", sa.Integer),  # 1 for the one that was last selected as the best of its job
    sa.UniqueConstraint("job", "path"),
    sqlite_autoincrement=True,
)
gpu_samples = _table(
    "gpu_samples",
    sa.Column("job", sa.Text, primary_key=True),  # "" for what the service measured itself
    sa.Column("gpu_index", sa.Integer, primary_key=True),
    sa.Column("ts", sa.Float, primary_key=True),
    sa.Column("utilization", sa.Float),
    sa.Column("memory_used", sa.Float),
    sa.Column("memory_total", sa.Float),
    sa.Column("temperature", sa.Float),
    sa.Column("power_w", sa.Float),
    sqlite_with_rowid=False,
)
samples = _table(
    "samples",
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("job", sa.Text, nullable=False, index=True),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("group", sa.Text),
    sa.Column("source", sa.Text),
    sa.Column("prompt", sa.Text, nullable=False),
    sa.Column("text", sa.Text),
    sa.Column("rewards", sa.JSON, nullable=False),
    sa.Column("reward", sa.Float),
    sa.Column("advantage", sa.Float),
    sa.Column("images", sa.JSON, nullable=False),  # names of files in the job's folder of samples
    sqlite_autoincrement=True,
)
alerts = _table(
    "alerts",
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("job", sa.Text, nullable=False, index=True),
    sa.Column("rule", sa.Text, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("step", sa.Integer),
    sa.Column("ts", sa.Float, nullable=False),
    sa.Column("ended_at", sa.Float),
    sqlite_autoincrement=True,
)
tasks = _table(
    "tasks",
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("output", sa.Text, nullable=False),
    sa.Column("details", sa.JSON, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("progress", sa.Float, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("ended_at", sa.Float),
)

FROM_1 = (
    "ALTER TABLE checkpoints ADD COLUMN chosen INTEGER",
    """CREATE TABLE tasks (id TEXT NOT NULL PRIMARY KEY, kind TEXT NOT NULL, output TEXT NOT NULL, details JSON NOT NULL,
    state TEXT NOT NULL, progress FLOAT NOT NULL, message TEXT NOT NULL, created_at FLOAT NOT NULL, ended_at FLOAT)""",
)

MIGRATIONS = (FROM_1,)
"""Statements that make the version after the first one, the second one, ... of a database that exists; a new one is made from the tables.

They are texts, and never edited: a step must give the tables of its own version, whatever the tables above become later.
"""

VERSION = 1 + len(MIGRATIONS)


def migrate(connection: sa.Connection) -> None:
    """Bring a database to the version of this release, in one transaction. Raises ValueError for one of a later release."""
    version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
    if version > VERSION:
        raise ValueError(f"the database is of version {version}, this release knows {VERSION}: use the release that wrote it")
    if not version:
        metadata.create_all(connection)
    for statements in MIGRATIONS[version - 1 :] if version else ():
        for statement in statements:
            connection.exec_driver_sql(statement)
    connection.exec_driver_sql(f"PRAGMA user_version = {VERSION}")
