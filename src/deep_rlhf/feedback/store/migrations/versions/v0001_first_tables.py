"""The first tables."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

BIG_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")
MOMENT = sa.DateTime(timezone=True)
QUEUE = {"sqlite": "open_slots > 0 AND withdrawn IS 0", "postgresql": "open_slots > 0 AND withdrawn IS false"}
EVENTS_LOCK = 7_310_002
HELD = sa.text("state = 'held'")


def upgrade() -> None:
    """Creates all tables."""
    _questions()
    _events()
    _trainer()
    _accounts()
    _refuse_changes_of_events()
    _let_inserts_of_events_share_a_lock()


def _questions() -> None:
    op.create_table(
        "comparisons",
        sa.Column("id", BIG_ID, primary_key=True),
        sa.Column("key", sa.Text, nullable=False, unique=True),
        sa.Column("prompt", sa.Text, nullable=False),
        sa.Column("answers", sa.Text, nullable=False),
        sa.Column("why_selected", sa.Text, nullable=False),
        sa.Column("policy_version", sa.Integer, nullable=False),
        sa.Column("reward_version", sa.Integer, nullable=False),
        sa.Column("writers", sa.Text, nullable=False),
        sa.Column("predicted", sa.Double),
        sa.Column("priority", sa.Double, nullable=False),
        sa.Column("overlap", sa.Integer, nullable=False),
        sa.Column("expected", sa.Text),
        sa.Column("repeat_of", BIG_ID, sa.ForeignKey("comparisons.id")),
        sa.Column("created", MOMENT, nullable=False),
        sa.Column("open_slots", sa.Integer, nullable=False),
        sa.Column("withdrawn", sa.Boolean, nullable=False, server_default=sa.false()),
        sqlite_autoincrement=True,
    )
    op.create_index(
        "ix_comparisons_queue",
        "comparisons",
        [sa.text("priority DESC"), "id"],
        sqlite_where=sa.text(QUEUE["sqlite"]),
        postgresql_where=sa.text(QUEUE["postgresql"]),
    )
    op.create_table(
        "leases",
        sa.Column("comparison_id", BIG_ID, sa.ForeignKey("comparisons.id"), primary_key=True),
        sa.Column("annotator", sa.Text, primary_key=True),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("shown_order", sa.Text, nullable=False),
        sa.Column("leased_at", MOMENT, nullable=False),
        sa.Column("leased_until", MOMENT, nullable=False),
    )
    op.create_index("ix_leases_annotator", "leases", ["annotator", "state"])
    op.create_index("ix_leases_held", "leases", ["leased_until"], sqlite_where=HELD, postgresql_where=HELD)


def _events() -> None:
    op.create_table(
        "events",
        sa.Column("id", BIG_ID, primary_key=True),
        sa.Column("token", sa.Text, nullable=False, unique=True),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("comparison_id", BIG_ID, sa.ForeignKey("comparisons.id"), nullable=False),
        sa.Column("annotator", sa.Text, nullable=False),
        sa.Column("choice", sa.Text),
        sa.Column("ranks", sa.Text),
        sa.Column("strength", sa.Integer),
        sa.Column("shown_order", sa.Text),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.Column("why_selected", sa.Text, nullable=False),
        sa.Column("policy_version", sa.Integer, nullable=False),
        sa.Column("reward_version", sa.Integer, nullable=False),
        sa.Column("undoes", BIG_ID, sa.ForeignKey("events.id"), unique=True),
        sa.Column("imported", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("created", MOMENT, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_events_comparison_id", "events", ["comparison_id"])
    op.create_index("ix_events_annotator", "events", ["annotator", "id"])


def _trainer() -> None:
    op.create_table(
        "versions",
        sa.Column("kind", sa.Text, primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("labels", sa.Integer, nullable=False),
        sa.Column("last_event", BIG_ID, nullable=False),
        sa.Column("figures", sa.Text, nullable=False),
        sa.Column("created", MOMENT, nullable=False),
    )
    op.create_table(
        "metrics",
        sa.Column("id", BIG_ID, primary_key=True),
        sa.Column("row", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "samples",
        sa.Column("policy_version", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("prompt", sa.Text, nullable=False),
        sa.Column("answer", sa.Text, nullable=False),
    )
    op.create_table(
        "alarms",
        sa.Column("id", BIG_ID, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("figure", sa.Double),
        sa.Column("limit", sa.Double),
        sa.Column("created", MOMENT, nullable=False),
    )
    op.create_table("state", sa.Column("name", sa.Text, primary_key=True), sa.Column("value", sa.Text))


def _accounts() -> None:
    op.create_table(
        "users",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("password_hash", sa.Text, nullable=False),
        sa.Column("created", MOMENT, nullable=False),
    )
    op.create_table(
        "logins",
        sa.Column("token_hash", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, sa.ForeignKey("users.name", ondelete="CASCADE"), nullable=False),
        sa.Column("expires", MOMENT, nullable=False),
    )
    op.create_index("ix_logins_expires", "logins", ["expires"])


def _refuse_changes_of_events() -> None:
    """Makes events immutable, whichever program opens the database."""
    if op.get_bind().dialect.name == "sqlite":
        for change in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER events_refuse_{change.lower()} BEFORE {change} ON events "
                "BEGIN SELECT RAISE(ABORT, 'events are never changed or deleted'); END"
            )
        return
    op.execute(
        "CREATE FUNCTION events_refuse() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'events are never changed or deleted'; END $$"
    )
    op.execute(
        "CREATE TRIGGER events_refuse_change BEFORE UPDATE OR DELETE ON events "
        "FOR EACH ROW EXECUTE FUNCTION events_refuse()"
    )
    op.execute(
        "CREATE TRIGGER events_refuse_truncate BEFORE TRUNCATE ON events "
        "FOR EACH STATEMENT EXECUTE FUNCTION events_refuse()"
    )


def _let_inserts_of_events_share_a_lock() -> None:
    """The lock is taken before the id and kept until the commit, so whoever waited for it sees all smaller ids."""
    if op.get_bind().dialect.name != "postgresql":
        return
    op.execute(
        "CREATE FUNCTION events_share_lock() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN PERFORM pg_advisory_xact_lock_shared({EVENTS_LOCK}); RETURN NULL; END $$"
    )
    op.execute(
        "CREATE TRIGGER events_share_lock BEFORE INSERT ON events "
        "FOR EACH STATEMENT EXECUTE FUNCTION events_share_lock()"
    )
