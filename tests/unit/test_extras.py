"""Extras: what works without an optional package, and the sentence for what does not."""

import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
from facts import assert_names

from deep_rlhf.errors import ResourceError
from deep_rlhf.evaluation.report import write_report, write_report_if_installed
from deep_rlhf.extras import EXTRAS, install_command, optional_packages
from deep_rlhf.models.quantisation import four_bit_config
from deep_rlhf.runtime.trackers import usable_trackers

ROOT = Path(__file__).resolve().parents[2]
# Where the module's name is not the package's.
PACKAGES = {"argon2": "argon2-cffi", "markdown_it": "markdown-it-py", "starlette": "fastapi"}


@pytest.mark.parametrize("extra", EXTRAS)
def test_every_module_is_installed_by_its_extra(extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = project["optional-dependencies"][extra]
    for module in EXTRAS[extra]:
        package = PACKAGES.get(module, module)
        assert any(requirement.startswith((f"{package}>", f"{package}[")) for requirement in requirements), module
        assert not any(requirement.startswith(f"{package}>") for requirement in project["dependencies"]), module


def test_the_install_command_names_the_extra_or_the_package() -> None:
    assert install_command("fastapi") == "pip install 'deep-rlhf[people]'"
    assert install_command("bitsandbytes") == "pip install 'deep-rlhf[8bit]'"
    assert install_command("aim") == "pip install aim"


def test_only_missing_extras_become_resource_errors() -> None:
    needed = r"The page needs the package sqlalchemy.*'deep-rlhf\[people\]'"
    with pytest.raises(ResourceError, match=needed), optional_packages("The page"):
        raise ModuleNotFoundError(name="sqlalchemy.orm")
    with pytest.raises(ModuleNotFoundError), optional_packages("The page"):
        raise ModuleNotFoundError(name="somebody_elses")


def without(module: str, program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a Python program to which `module` is not installed."""
    blocked = f"import sys; sys.modules[{module!r}] = None\n" + textwrap.dedent(program)
    return subprocess.run(
        [sys.executable, "-c", blocked], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )


def command(*argv: str) -> str:
    return f"from deep_rlhf.cli.main import run\nrun({argv[0]!r}, {list(argv[1:])!r})\n"


@pytest.mark.processes
@pytest.mark.parametrize(
    ("module", "argv"),
    [
        ("fastapi", ("label", "--store=labels.db", "--port=0")),
        ("uvicorn", ("teach", "--port=0")),
        ("sqlalchemy", ("store", "show", "labels.db")),
        ("sqlalchemy", ("loop",)),
        ("psycopg", ("store", "show", "postgresql://localhost/labels")),
    ],
)
def test_a_command_without_its_extra_is_one_sentence(module: str, argv: tuple[str, ...], tmp_path: Path) -> None:
    finished = without(module, command(*argv), tmp_path)
    assert finished.returncode == 2, finished.stderr
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: ")
    assert f"needs the package {module}" in line
    assert install_command(module) in line


def test_a_report_without_its_extra_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ResourceError, match=r"matplotlib.*pip install 'deep-rlhf\[report\]'"):
        write_report(tmp_path / "report.html", title="A run")
    assert write_report_if_installed(tmp_path / "report.html", title="A run") is None
    assert "pip install 'deep-rlhf[report]'" in caplog.text
    assert not (tmp_path / "report.html").exists()


def test_8_bit_without_its_extra_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ResourceError, match=r"load_in_4bit.*pip install 'deep-rlhf\[8bit\]'"):
        four_bit_config()


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard", "trackio", "mlflow"])
def test_a_tracker_without_its_extra_is_left_out(
    tracker: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, tracker, None)
    assert usable_trackers([tracker], run_name="run") == []
    assert f"pip install 'deep-rlhf[{tracker}]'" in caplog.text


@pytest.mark.processes
@pytest.mark.parametrize(
    ("module", "name", "extra"), [("sqlalchemy", "Store", "people"), ("sqlalchemy", "Session", "people")]
)
def test_a_public_name_without_its_extra_is_one_sentence(module: str, name: str, extra: str, tmp_path: Path) -> None:
    program = f"""
    import deep_rlhf
    try:
        deep_rlhf.{name}
    except deep_rlhf.ResourceError as error:
        print(error)
    """
    finished = without(module, program, tmp_path)
    (line,) = finished.stdout.splitlines()
    assert_names(line, f"deep_rlhf.{name}", module, f"pip install 'deep-rlhf[{extra}]'")


TINY_RUN = """
import sys
for module in {blocked!r}:
    sys.modules[module] = None
from pathlib import Path
from transformers import GPT2Config, GPT2LMHeadModel
from deep_rlhf.cli.synthetic_policy import build_tokenizer
from deep_rlhf.cli.main import run

tokenizer = build_tokenizer(1)
tokenizer.save_pretrained("policy")
GPT2LMHeadModel(
    GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
).save_pretrained("policy")
Path("rewards.py").write_text("def score(prompts, responses):\\n    return [float(len(text)) for text in responses]\\n")
Path("prompts.txt").write_text("How do I bake bread?\\nHow do I brew tea?\\n")
run("ppo", ["--model_name=policy", "--reward_model=python:rewards:score", "--query_dataset=prompts.txt", "--steps=8",
            "--batch_size=4", "--mini_batch_size=4", "--max_new_tokens=4", "--output_dir=out"])
"""


@pytest.mark.processes
def test_the_base_install_trains(tmp_path: Path) -> None:
    """Without any extra: the package, the help and a PPO run; only the report is missing, and that is said."""
    blocked = [module for modules in EXTRAS.values() for module in modules]
    finished = subprocess.run(
        [sys.executable, "-c", TINY_RUN.format(blocked=blocked)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert "pip install 'deep-rlhf[report]'" in finished.stderr
    assert (tmp_path / "out" / "model" / "config.json").exists()
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "out" / "report.html").exists()


@pytest.mark.processes
def test_the_help_needs_no_extra(tmp_path: Path) -> None:
    blocked = [module for modules in EXTRAS.values() for module in modules]
    program = f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\nimport deep_rlhf\n" + command(
        "ppo", "--help"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert "--init_kl_coef" in finished.stdout
