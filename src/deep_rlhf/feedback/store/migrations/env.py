"""Run by Alembic: applies the revisions on the connection, and in the transaction, that the store passes in."""

from alembic import context

from deep_rlhf.feedback.store.schema import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA, transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
