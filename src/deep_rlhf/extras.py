"""Optional packages: the extra that installs each of them, and the error that a user gets without it."""

from collections.abc import Iterator
from contextlib import contextmanager

from deep_rlhf.errors import ResourceError

# Modules by the extra of pyproject.toml that installs them.
EXTRAS = {
    "people": (
        "alembic",
        "argon2",
        "fastapi",
        "krippendorff",
        "markdown_it",
        "nh3",
        "sqlalchemy",
        "starlette",
        "uvicorn",
    ),
    "postgresql": ("psycopg",),
    "report": ("matplotlib",),
    "8bit": ("bitsandbytes",),
    "wandb": ("wandb",),
    "tensorboard": ("tensorboard",),
    "trackio": ("trackio",),
    "mlflow": ("mlflow",),
}


def install_command(module: str) -> str:
    """The shell command that installs `module`: through its extra, which knows the versions that fit, if it has one."""
    for extra, modules in EXTRAS.items():
        if module in modules:
            return f"pip install 'deep-rlhf[{extra}]'"
    return f"pip install {module}"


@contextmanager
def optional_packages(user: str) -> Iterator[None]:
    """Raises ResourceError, with the command that installs it, where the block imports an extra that is missing.

    `user` opens the sentence: what needs the package.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if not any(module in modules for modules in EXTRAS.values()):
            raise
        raise ResourceError(
            f"{user} needs the package {module}, which is not installed: {install_command(module)}."
        ) from error
