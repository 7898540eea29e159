"""Databases: damaged, of other programs, of other versions, with rows that we would not write."""

import random
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from fuzz.case import Case, Workshop
from fuzz.kinds.mutations import damage
from fuzz.world import LOOP, OUT

ROW_VALUES: list[Any] = [  # of every type
    *(
        None,
        "",
        "x",
        "null",
        "[]",
        "{}",
        '["x"]',
        '["x", 3]',
        '{"a": 1}',
        "[[1]]",
        b"\xff\x00",
        -1,
        0,
        2**62,
        1e308,
        "nan",
    ),
    *(
        "2024-13-45",
        "9999-12-31 23:59:59.999999",
        "yesterday",
        "é\ud7ff",
        "x" * 10_000,
        "[" * 2000,
        float("inf"),
        "answer",
    ),
]


def make(shop: Workshop) -> Case:
    """A command on such a database."""
    rng = shop.random
    shop.take("labels.jsonl", "policy")
    made = rng.choices((foreign, broken, odd_rows, odd_schema, odd_rows, right), (3, 4, 4, 3, 2, 1))[0]
    path, what, may_be_used = made(rng, shop)
    command = rng.choices(("show", "export", "import", "label", "add_user", "loop", "teach"), (4, 4, 3, 2, 1, 1, 1))[0]
    writes = [path.name, *(f"{path.name}{end}" for end in ("-wal", "-shm"))] if may_be_used else []
    options: dict[str, Any] = {"refused": made is foreign}
    if command in ("show", "export"):
        argv = [
            "store",
            command,
            path.name,
            *(["exported.jsonl"] if command == "export" else []),
            *rng.choice(([], ["--all"] if command == "export" else [])),
        ]
        writes = ["exported.jsonl"] if command == "export" else []
        if may_be_used and what.startswith("schema"):  # an older store is migrated when it is opened
            writes.append(path.name)
    elif command == "import":
        argv = ["store", "import", path.name, "labels.jsonl"]
    elif command == "label":
        argv = ["label", f"--store={path.name}", "--port=0"]
        options |= {"interrupt": 4.0, "seconds": 30}
    elif command == "add_user":
        argv = [
            "label",
            f"--store={path.name}",
            rng.choice(("--add_user=ann", "--remove_user=anna", "--set_password=ann")),
        ]
        options |= {"env": {"DEEP_RLHF_PASSWORD": "correct horse battery"}}
    elif command == "loop":
        shop.take("votes.jsonl")
        argv = [*LOOP, f"--store={path.name}", OUT]
    else:
        argv = ["teach", f"--store={path.name}", "--port=0", "--model=policy", OUT]
        options |= {"interrupt": 5.0, "seconds": 90}
    # "nowhere" is where a dangling link leads.
    return Case(argv, f"{command}: {what}", ("out", "nowhere", *writes), **options)


def foreign(rng: random.Random, shop: Workshop) -> tuple[Path, str, bool]:
    """A database of another program, and other files."""
    path = shop.folder / rng.choice(("app.db", "labels.db"))
    how = rng.choice(
        ("tables", "our names", "alembic of another", "text", "zip", "other journal", "view only", "attached header")
    )
    if how == "text":
        path.write_text("not a database\n" * 100)
    elif how == "zip":
        path.write_bytes(b"PK\x03\x04" + rng.randbytes(5000))
    else:
        with closing(sqlite3.connect(path)) as database, database:
            if how == "other journal":
                database.execute("pragma journal_mode=persist")
            statements = {
                "our names": "create table events (id integer primary key, x text); create table users (name text)",
                "alembic of another": "create table alembic_version (version_num varchar(32) primary key);"
                "insert into alembic_version values ('5f2621c13b39'); create table customer (id integer)",
                "view only": "create view v as select 1",
                "attached header": "pragma application_id=1179207; pragma user_version=7; create table t (x)",
            }
            database.executescript(statements.get(how, "create table app (x integer); insert into app values (1), (2)"))
    return path, f"a foreign file: {how}", False


def broken(rng: random.Random, shop: Workshop) -> tuple[Path, str, bool]:
    """Damaged pages, and files in place of files."""
    shop.take("labels.db")
    path = shop.folder / "labels.db"
    if rng.random() < 0.5:
        return path, damage(rng, path)[0], True
    data = bytearray(path.read_bytes())
    how = rng.choice(("pages", "header", "cut", "wal"))
    if how == "pages":
        for _ in range(rng.randint(1, 4)):
            page = rng.randrange(1, max(2, len(data) // 4096)) * 4096
            data[page : page + 4096] = rng.choice((bytes(4096), rng.randbytes(4096)))
    elif how == "header":
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(100)] = rng.randrange(256)
    elif how == "cut":
        del data[rng.randrange(1, len(data) // 4096) * 4096 :]
    else:
        Path(f"{path}-wal").write_bytes(rng.randbytes(9000))
    path.write_bytes(data)
    return path, f"damaged: {how}", True


def odd_rows(rng: random.Random, shop: Workshop) -> tuple[Path, str, bool]:
    """Values in rows that are not ours."""
    shop.take("labels.db")
    path, done = shop.folder / "labels.db", []
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("pragma foreign_keys=off")
        for (name,) in database.execute("select name from sqlite_master where type='trigger'").fetchall():
            database.execute(f"drop trigger {name}")
        tables = ("comparisons", "events", "leases", "events", "comparisons", "state", "metrics", "versions", "users")
        for _ in range(rng.choice((1, 1, 2))):
            table = rng.choice(tables)
            columns = [row[1] for row in database.execute(f"pragma table_info({table})")]
            column, value = rng.choice(columns), rng.choice(ROW_VALUES)
            every = rng.choice(("", " where rowid = (select min(rowid) from " + table + ")"))
            try:
                database.execute(f"update {table} set {column} = ?{every}", (value,))
                done.append(f"{table}.{column} = {value!r:.30}")
            except sqlite3.IntegrityError:
                done.append("nothing")
        if rng.random() < 0.2:
            database.execute("delete from comparisons where rowid = 1")
            done.append("a question is gone")
    return path, f"odd rows: {', '.join(done)}", True


def odd_schema(rng: random.Random, shop: Workshop) -> tuple[Path, str, bool]:
    """Another version, tables and columns that are missing."""
    shop.take("labels.db")
    path = shop.folder / "labels.db"
    how = rng.choice(
        ("newer", "no version", "two versions", "empty version", "table gone", "column gone", "table more", "read only")
    )
    with closing(sqlite3.connect(path)) as database, database:
        tables = [
            row[0]
            for row in database.execute(
                "select name from sqlite_master where type='table' and name not like 'sqlite_%'"
            )
        ]
        table = rng.choice([name for name in tables if name != "alembic_version"])
        if how == "newer":
            database.execute("update alembic_version set version_num = '9999'")
        elif how == "no version":
            database.execute("drop table alembic_version")
        elif how == "two versions":
            database.execute("insert into alembic_version values ('9999')")
        elif how == "empty version":
            database.execute("delete from alembic_version")
        elif how == "table gone":
            database.execute("pragma foreign_keys=off")
            database.execute(f"drop table {table}")
            how = f"table {table} gone"
        elif how == "column gone":
            columns = [row[1] for row in database.execute(f"pragma table_info({table})")]
            column = rng.choice(columns)
            try:
                database.execute(f"alter table {table} rename column {column} to gone")
            except sqlite3.OperationalError:
                database.execute("create table more (x)")
            how = f"column {table}.{column} gone"
        elif how == "table more":
            database.execute("create table more (x)")
    if how == "read only":
        path.chmod(0o400)
    return path, f"schema: {how}", True


def right(rng: random.Random, shop: Workshop) -> tuple[Path, str, bool]:
    """A store as it should be, or one that is not there yet."""
    if rng.random() < 0.5:
        shop.take("labels.db")
        shutil.copy(shop.folder / "labels.db", shop.folder / "other.db")
        return shop.folder / "other.db", "a right store", True
    return shop.folder / "new.db", "no store", True
