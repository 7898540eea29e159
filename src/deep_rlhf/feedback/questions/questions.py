"""What people are asked: questions chosen from many candidates, and a few that measure people and the policy."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from deep_rlhf.data.readers import BadRow, read_table
from deep_rlhf.errors import UserError
from deep_rlhf.feedback.loop.config import SessionConfig
from deep_rlhf.feedback.questions.acquisition import choose
from deep_rlhf.feedback.questions.candidates import (
    Candidate,
    Prompts,
    Write,
    rewards_of,
    sample_candidates,
    win_rate_pairs,
)
from deep_rlhf.feedback.records import FOR_LABEL, MU, Choice, Comparison, Label, Reason
from deep_rlhf.feedback.state import QUESTION_CURSOR, QuestionCursor
from deep_rlhf.feedback.store import Store
from deep_rlhf.types import Scorer

BETWEEN_REPEATS = 10  # answers of a person before a question may come again
PRESENT = 100  # the newest answers, whose annotators are taken to be there
PER_PERSON = 3  # questions that wait for each of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Asker:
    """Who writes the answers that are asked about, and which versions that makes it."""

    now: Write  # the policy
    start: Write  # what it began as
    scorer: Scorer | None  # the reward model in log-odds, once there is one
    policy_version: int
    reward_version: int


class Questions:
    """Keeps questions waiting in the store, and there how far it has come."""

    def __init__(self, config: SessionConfig, store: Store, prompts: Sequence[str], held_out: Sequence[str]) -> None:
        self.config, self.store = config, store
        self._prompts = Prompts(prompts, seed=config.seed)
        self._held_out = Prompts(held_out, seed=config.seed + 1) if held_out else None
        self._gold = read_gold(config.gold_questions) if config.gold_questions else []
        self._labels: list[Label] = []
        self._repeated: set[int] = set()  # questions that were asked again
        self._go_on(QUESTION_CURSOR.read(store) or QuestionCursor())

    def _go_on(self, cursor: QuestionCursor) -> None:
        """From where an earlier run was, so that nothing is asked twice."""
        self._draws, self._golden = cursor.draws, cursor.gold
        self._prompts.position = cursor.prompts
        if self._held_out:
            self._held_out.position = cursor.held_out

    def _keep(self) -> None:
        held_out = self._held_out.position if self._held_out else 0
        prompts = self._prompts.position
        cursor = QuestionCursor(draws=self._draws, gold=self._golden, prompts=prompts, held_out=held_out)
        QUESTION_CURSOR.write(self.store, cursor)

    def missing(self, wanted: int | None) -> int:
        """How many more questions should wait; `wanted`: the labels that are still wanted at all, None for any number.

        What waits may be nothing for who is there: he has skipped it, or answered it and it waits for a second person.
        So only what nobody has seen counts.
        """
        self._labels += self.store.labels(after=self._labels[-1].event_id if self._labels else 0)
        ahead = max(self.config.questions_ahead, PER_PERSON * len(self._present()))
        ahead = ahead if wanted is None else min(ahead, wanted)
        return max(0, ahead - self.store.unseen())

    def ask(self, count: int, asker: Asker) -> list[int]:
        """Puts `count` questions into the store, or fewer where answers are all the same; returns their ids."""
        self._draws += 1
        rng = random.Random(f"{self.config.seed}/questions/{self._draws}")
        kinds = [self._kind(rng, asker) for _ in range(count)]
        asked = self._blind(kinds.count("win_rate"), asker, rng)
        asked += self._repeats(kinds.count("repeat"), asker)
        asked += self._known(kinds.count("gold"), asker)
        asked += self._for_labels(count - len(asked), asker, rng)
        rng.shuffle(asked)
        self._keep()
        return self.store.add(asked)

    def _kind(self, rng: random.Random, asker: Asker) -> str:
        """By lot, so that the shares come out however few are asked at a time."""
        config, lot = self.config, rng.random()
        shares = {
            "gold": config.gold_share if self._golden < len(self._gold) else 0.0,
            "repeat": config.repeat_share,
            "win_rate": config.win_rate_share if asker.policy_version > 0 and self._held_out else 0.0,
        }
        for kind, share in shares.items():
            if lot < share:
                return kind
            lot -= share
        return "label"

    def _for_labels(self, count: int, asker: Asker, rng: random.Random) -> list[Comparison]:
        if count == 0:
            return []
        config, answers = self.config, self.config.ranked_answers
        by_lot = asker.scorer is None or config.choose_by == "random"  # then more samples would be for nothing
        groups = sample_candidates(
            asker.now,
            self._prompts.next(count),
            samples=answers if by_lot else config.samples_per_prompt,
            answers=answers,
            seed=self._seed(),
        )
        if asker.scorer is None:
            return [self._question(own[0], asker, "initial", None, rng) for own in groups if own]
        candidates = [one for own in groups for one in own]
        if not candidates:
            return []
        chosen = choose(
            rewards_of(candidates, asker.scorer),
            count,
            way=config.choose_by,
            random_share=config.random_share,
            generator=torch.Generator().manual_seed(self._seed()),
            label_noise=config.label_noise,
        )
        pairs = answers == 2
        return [
            self._question(candidates[one.index], asker, one.reason, one.predicted if pairs else None, rng)
            for one in chosen
        ]

    def _question(
        self, candidate: Candidate, asker: Asker, reason: Reason, predicted: float | None, rng: random.Random
    ) -> Comparison:
        shared = len(self._present()) > 1 and rng.random() < self.config.overlap_share
        return Comparison(
            prompt=candidate.prompt,
            answers=candidate.answers,
            why_selected=reason,
            policy_version=asker.policy_version,
            reward_version=asker.reward_version,
            predicted=predicted,
            priority=float(asker.policy_version),
            overlap=2 if shared else 1,
        )

    def _blind(self, count: int, asker: Asker, rng: random.Random) -> list[Comparison]:
        """The policy against the start on held-out prompts; nothing on the page tells which is which."""
        if count == 0 or self._held_out is None:
            return []
        found = []
        for prompt, now, start in win_rate_pairs(asker.now, asker.start, self._held_out.next(count), seed=self._seed()):
            pair = [(now, asker.policy_version), (start, 0)]
            rng.shuffle(pair)
            found.append(
                Comparison(
                    prompt=prompt,
                    answers=tuple(text for text, _ in pair),
                    why_selected="win_rate",
                    policy_version=asker.policy_version,
                    reward_version=asker.reward_version,
                    writers=tuple(version for _, version in pair),
                    priority=float(asker.policy_version),
                )
            )
        return found

    def _known(self, count: int, asker: Asker) -> list[Comparison]:
        """The next gold questions, in the queue among those about the policy as it is."""
        gold = self._gold[self._golden : self._golden + count]
        self._golden += len(gold)
        return [replace(question, priority=float(asker.policy_version)) for question in gold]

    def _repeats(self, count: int, asker: Asker) -> list[Comparison]:
        """Earlier questions of people who are there, with the answers the other way round."""
        self._repeated |= {label.comparison.repeat_of for label in self._labels if label.comparison.repeat_of}
        people = self._present()
        known = [
            label
            for label in self._own()[:-BETWEEN_REPEATS]
            if label.choice in ("a", "b", "tie")
            and label.annotator in people
            and label.comparison.why_selected in FOR_LABEL
            and label.comparison_id not in self._repeated
        ]
        chosen = random.Random(self._seed()).sample(known, min(count, len(known)))
        self._repeated |= {label.comparison_id for label in chosen}
        return [
            Comparison(
                prompt=label.comparison.prompt,
                answers=label.comparison.answers[::-1],
                why_selected="repeat",
                policy_version=label.comparison.policy_version,
                reward_version=label.comparison.reward_version,
                priority=float(asker.policy_version),
                repeat_of=label.comparison_id,
            )
            for label in chosen
        ]

    def _present(self) -> set[str]:
        return {label.annotator for label in self._own()[-PRESENT:]}

    def _own(self) -> list[Label]:
        """Without those from files: who gave them is not there."""
        return [label for label in self._labels if not label.imported]

    def _seed(self) -> int:
        """Another one for each use, far from the seeds of the updates."""
        self._draws += 1
        return (self.config.seed * 7_368_787 + self._draws * 15_485_863 + 2**31) % 2**32


def read_gold(path: str | Path) -> list[Comparison]:
    """Gold questions from a file: prompt, a, b, and the expected choice (a, b or tie). Raises UserError."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no file of gold questions '{path}'.")
    found = []
    for where, row in read_table(path):
        problem = row if isinstance(row, BadRow) else _problem_of(row)
        if problem:
            raise UserError(f"{path}, {where}: {problem}; a gold question has prompt, a, b and expected.")
        assert isinstance(row, dict)
        choice: Choice = row["expected"]
        found.append(
            Comparison(prompt=row["prompt"], answers=(row["a"], row["b"]), why_selected="gold", expected=choice)
        )
    return found


def _problem_of(row: dict[str, Any]) -> str | None:
    for name in ("prompt", "a", "b"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            return f"'{name}' is missing or empty"
    choices = [choice for choice, mu in MU.items() if mu is not None]
    return None if row.get("expected") in choices else f"'expected' must be one of {', '.join(choices)}"
