"""What Alembic runs: the revisions, on the connection and in the transaction that the store hands in."""

from alembic import context

from deep_rlhf.feedback.store.schema import Base

context.configure(
    connection=context.config.attributes["connection"], target_metadata=Base.metadata, transactional_ddl=True
)
with context.begin_transaction():
    context.run_migrations()
