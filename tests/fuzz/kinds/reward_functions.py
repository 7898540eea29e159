"""Reward functions that raise, end, hang, move, return nonsense, or change what they are given."""

from pathlib import Path

from fuzz.case import Case, Workshop
from fuzz.kinds.flags import base_command
from fuzz.world import FUNCTION, OUT

# What a function does instead of returning numbers, and whether the run must then be refused.
BODIES = {
    "return ['x'] * len(responses)": True,
    "return [None] * len(responses)": True,
    "return [1j] * len(responses)": True,
    "return {i: 1.0 for i, _ in enumerate(responses)}": True,
    "return {float(i) for i, _ in enumerate(responses)}": True,
    "return frozenset(range(len(responses)))": True,
    "return 'x' * len(responses)": True,
    "return b'x' * len(responses)": True,
    "return '1' * len(responses)": True,
    "return None": True,
    "return 1.0": True,
    "return []": True,
    "return [[1.0]] * len(responses)": False,
    "return [[1.0, 2.0]] * len(responses)": True,
    "return [1.0] * (len(responses) + 1)": True,
    "return [1.0] * (len(responses) - 1)": True,
    "return (1.0 for _ in responses)": False,
    "return itertools.repeat(1.0)": True,
    "return itertools.count()": True,
    "return iter(int, 1)": True,
    "return map(float, ['x'] * len(responses))": True,
    "return torch.ones(len(responses))": False,
    "return torch.ones(len(responses), 1)": False,
    "return torch.ones(len(responses), 2)": True,
    "return torch.ones(len(responses), dtype=torch.complex64)": True,
    "return torch.full((len(responses),), float('nan'))": True,
    "return torch.ones(len(responses), requires_grad=True)": False,
    "return torch.ones(len(responses), device='meta')": True,
    "return torch.tensor(1.0)": True,
    "return torch.empty(0)": True,
    "return numpy.ones(len(responses))": False,
    "return numpy.array(['a'] * len(responses))": True,
    "return numpy.array([None] * len(responses))": True,
    "return numpy.ones(len(responses), dtype=complex)": True,
    "return numpy.array(['2024-01-01'] * len(responses), dtype='datetime64[D]')": True,
    "return [float('nan')] * len(responses)": True,
    "return [float('inf')] * len(responses)": True,
    "return [1e300] * len(responses)": True,
    "return [1e38] * len(responses)": False,
    "return [10**400] * len(responses)": True,
    "return [True] * len(responses)": False,
    "return [decimal.Decimal('1.5')] * len(responses)": False,
    "return [fractions.Fraction(1, 3)] * len(responses)": False,
    "return [Float()] * len(responses)": True,
    "return [BadRepr()] * len(responses)": True,
    "return BadLength()": True,
    "return BadIterator()": True,
    "return BadList([1.0] * len(responses))": True,
    "return [BadFloat(1.0)] * len(responses)": True,
    "return lambda: 1": True,
    "return responses": True,
    "raise SystemExit": True,
    "raise SystemExit(0)": True,
    "raise SystemExit('bye')": True,
    "sys.exit(3)": True,
    "raise KeyboardInterrupt": True,
    "raise GeneratorExit": True,
    "raise BaseException('x')": True,
    "raise MyBase('x')": True,
    "raise StopIteration": True,
    "raise MemoryError": True,
    "raise RecursionError": True,
    "raise BadError()": True,
    "raise ExceptionGroup('x', [ValueError(1)])": True,
    "raise BaseExceptionGroup('x', [KeyboardInterrupt()])": True,
    "raise ValueError('a\\nb\\0c\\ud800')": True,
    "raise OSError(28, 'No space left on device')": True,
    "raise TimeoutError": True,
    "raise asyncio.CancelledError": True,
    "raise UnicodeDecodeError('utf-8', b'x', 0, 1, 'y')": True,
    "raise UserError('the function says so')": True,
    "raise 3": True,
    "return 1 / 0": True,
    "return undefined": True,
    "f = lambda: f(); f()": True,
    "threading.Event().wait()": True,
    "time.sleep(1000)": True,
    "while True: pass": True,
    "os.chdir('/'); return [1.0] * len(responses)": False,
    "os.chdir('home'); return [1.0] * len(responses)": False,
    "os.environ.clear(); return [1.0] * len(responses)": False,
    "prompts.clear(); n = len(responses); responses.clear(); return [1.0] * n": False,
    "prompts[0] = 3; responses[0] = None; return [1.0] * len(responses)": False,
    "torch.manual_seed(0); return [1.0] * len(responses)": False,
    "torch.set_grad_enabled(False); return [1.0] * len(responses)": False,
    "torch.set_default_dtype(torch.float64); return [1.0] * len(responses)": False,
    "print('noise'); return [1.0] * len(responses)": False,
    "sys.stdout.close(); return [1.0] * len(responses)": False,
    "sys.stdout = None; return [1.0] * len(responses)": False,
    "os.umask(0o777); return [1.0] * len(responses)": False,
    "signal.signal(signal.SIGINT, signal.SIG_IGN); return [1.0] * len(responses)": None,
    "warnings.warn('x'); return [1.0] * len(responses)": False,
    "logging.disable(logging.CRITICAL); return [1.0] * len(responses)": False,
    "sys.setrecursionlimit(50); return [1.0] * len(responses)": None,
    "(yield 1.0)": True,
    "yield from [1.0] * len(responses)": False,
    "yield 1.0; raise ValueError('late')": True,
    "yield 1.0; raise SystemExit": True,
}
CLASSES = """
import asyncio, decimal, fractions, itertools, logging, os, signal, sys, threading, time, warnings
import numpy, torch
from deep_rlhf.errors import UserError
class Float:
    def __float__(self): raise ValueError('no float')
class BadFloat(float):
    def __float__(self): raise KeyError('no float')
class BadRepr:
    def __repr__(self): raise ValueError('no repr')
    __str__ = __repr__
class BadLength:
    def __len__(self): raise ValueError('no length')
    def __getitem__(self, i): raise KeyError(i)
class BadIterator:
    def __iter__(self): raise ValueError('no iterator')
class BadList(list):
    def __iter__(self): raise ValueError('no items')
    def __len__(self): raise ValueError('no length')
class MyBase(BaseException): pass
class BadError(Exception):
    def __str__(self): raise ValueError('no text')
    __repr__ = __str__
calls = 0
"""
MODULES = {
    "raise SystemExit": True,
    "raise SystemExit(0)": True,
    "raise KeyboardInterrupt": True,
    "raise BaseException('x')": True,
    "def broken(:": True,
    "\0": True,
    "import nothing_of_this_name": True,
    "\n  x = 1": True,
    "1 / 0": True,
    "length = 3": True,
    "length = None": True,
    "class length: pass": True,
    "async def length(prompts, responses): return [1.0] * len(responses)": True,
    "def length(prompts): return [1.0] * len(prompts)": True,
    "def length(): return 1": True,
    "def length(prompts, responses, *, more): return 1": True,
    "def length(*texts): return [1.0] * len(texts[0])": False,
    "length = lambda prompts, responses: [1.0] * len(responses)": False,
    "def __getattr__(name): raise ValueError(name)": True,
    "# -*- coding: nonsense -*-": True,
    "": True,
}
SPECS = (
    "python:",
    "python:rewards",
    "python:rewards:",
    "python::length",
    "python:nothing:length",
    "python:rewards:nothing",
)
SPECS += (
    "python:rewards:length:more",
    "python:.rewards:length",
    "python:os:getcwd",
    "python:rewards:__name__",
    "",
    "python:é:x",
)
SPECS += (
    "python:sys:exit",
    "python:builtins:print",
    "python:rewards/length:length",
    "python:a b:c",
    "python:\0:x",
    "python:..:x",
)


def make(shop: Workshop) -> Case:
    """An online algorithm with such a function from the first call on, or from a later one."""
    rng = shop.random
    shop.take("policy", "prompts.jsonl", "rewards.py")
    command = rng.choice(("ppo", "ppo", "rloo", "grpo", "trpo", "reinforce_plus_plus"))
    argv = [*base_command(command), OUT, "--reward_timeout=1"]
    how = rng.random()
    if how < 0.1:
        spec = rng.choice(SPECS)
        return Case([*argv, f"--reward_model={spec}"], f"reward {spec!r}", refused=True)
    if how < 0.3:
        text = rng.choice([*MODULES])
        (shop.folder / "rewards.py").write_text(text, errors="surrogateescape")
        return Case(argv, f"a module with {text!r}", refused=MODULES[text])
    body = rng.choice([*BODIES])
    first = rng.choice((1, 1, 2, 3))
    lines = [CLASSES, "def length(prompts, responses):", "    global calls", "    calls += 1"]
    if "yield" not in body:
        lines += [f"    if calls < {first}: return [float(len(text)) for text in responses]"]
    else:
        first = 1
    lines += [f"    {part}" for part in body.split("; ")] if not body.startswith(("f =", "while")) else [f"    {body}"]
    (shop.folder / "rewards.py").write_text("\n".join(lines) + "\n", errors="surrogateescape")
    must = bool(BODIES[body]) and first < 3  # the third call is that of the report, if each update asks once
    flags = ["--max_bad_batches=1"] if "nan" in body or "inf" in body or "1e300" in body or "10**400" in body else []
    return Case([*argv, FUNCTION, *flags], f"from call {first} on: {body}", refused=must, check=unmoved)


def unmoved(folder: Path) -> str | None:
    """The model is where it was asked for."""
    return None if (folder / "out" / "model").is_dir() else "the model was written elsewhere"
