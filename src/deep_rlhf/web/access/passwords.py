"""Password hashing: argon2id, a bound on concurrent hashing, and the same work for accounts without a password."""

import threading
from functools import cache

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from deep_rlhf.errors import ConfigError
from deep_rlhf.web.access.cookies import new_token

SHORTEST_PASSWORD, LONGEST_PASSWORD = 8, 1000  # characters
NO_PASSWORD = "!"  # stored for accounts that only the access token opens; no password has this hash
_HASHER = PasswordHasher()
_HASHING = threading.Semaphore(2)  # each computation takes 64 MiB


def hash_password(password: str) -> str:
    """Returns the salted argon2id hash of a password."""
    with _HASHING:
        return _HASHER.hash(password)


def is_password(password: str, password_hash: str) -> bool:
    """Whether the password matches the hash; slow by design."""
    try:
        with _HASHING:
            return _HASHER.verify(password_hash, password)
    except (VerificationError, InvalidHashError, UnicodeEncodeError):
        return False


@cache
def dummy_hash() -> str:
    """A hash that no known password matches: checking it takes as long as checking a real one."""
    return hash_password(new_token())


def check_password_length(password: str) -> None:
    """Raises ConfigError for a password that is too short or too long."""
    if not SHORTEST_PASSWORD <= len(password) <= LONGEST_PASSWORD:
        raise ConfigError(f"A password must have {SHORTEST_PASSWORD} to {LONGEST_PASSWORD} characters.")
